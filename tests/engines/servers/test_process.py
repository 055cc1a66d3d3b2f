"""The engine's process: who starts it, what it dies of, and that nothing of it outlives its trainer. A stub stands in
for vLLM: a web server with a child, as vLLM has. `make test-vllm` does the same with vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit.engines.servers.http import Client
from opdkit.engines.servers.process import HERE, VllmOptions, VllmProcess, command, find_vllm, why
from opdkit.errors import UserError

STUB = """
import http.server, os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
tries = here / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= int((here / "busy").read_text()):
    sys.exit("OSError: [Errno 98] Address already in use")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(here / "child").write_text(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if self.path == "/health" or self.headers["Authorization"] == key else 401)
        self.send_header("Content-Length", "0"), self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path: Path) -> Callable[..., Path]:
    """A `python` that has a vLLM of this version."""

    def make(version: str = "0.32.0", busy: int = 0) -> Path:
        (tmp_path / "stub.py").write_text(STUB)
        (tmp_path / "busy").write_text(str(busy))
        python = tmp_path / "python"
        found = '{"vllm": "%s"}' % version  # noqa: UP031
        python.write_text(
            f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{found}'; exit; fi\n"
            f'exec {sys.executable} {tmp_path / "stub.py"} "$@"\n'
        )
        python.chmod(0o755)
        return python

    return make


def process_of(python: Path, tmp_path: Path) -> VllmProcess:
    options = VllmOptions(model="m", dtype="float32", python=str(python))
    return VllmProcess(options, log=tmp_path / "log", folder=tmp_path / "weights")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    for _ in range(100):
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_start_and_stop_leave_nothing(stub: Callable[..., Path], tmp_path: Path) -> None:
    """Also where a port was taken before the engine could use it: it gets another."""
    process, told = process_of(stub(busy=1), tmp_path), []
    client = process.start(told.append)
    assert client.ask("/health") == b"" and process.is_running and told
    child = int((tmp_path / "child").read_text())
    assert client.ask("/anything") == b""  # it knows the key of this start, which is on no command line and in no file
    with pytest.raises(UserError, match="401"):
        Client(client.url, patience_s=0, token="another").ask("/anything")
    key = client._token or ""
    assert len(key) > 40 and key not in " ".join(command(process.options, process.found, 1))
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    process.stop()
    assert gone(child) and not process.is_running and not (tmp_path / "weights").exists()


def test_what_a_killed_server_leaves_behind_is_ended(stub: Callable[..., Path], tmp_path: Path) -> None:
    """And it starts again, with the weights that were handed over still there."""
    process = process_of(stub(), tmp_path)
    process.start(lambda seconds: None)
    (tmp_path / "weights" / "kept").touch()
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    child = int((tmp_path / "child").read_text())
    os.kill(int(found.stdout), signal.SIGKILL)
    assert gone(child, process.pid or 0) and not process.is_running
    process.start(lambda seconds: None)
    assert process.is_running and (tmp_path / "weights" / "kept").exists()
    process.stop()


def test_the_engine_ends_with_a_trainer_that_is_killed(stub: Callable[..., Path], tmp_path: Path) -> None:
    code = f"""
        import time; from pathlib import Path
        from opdkit.engines.servers.process import HERE, VllmOptions, VllmProcess
        here = Path({str(tmp_path)!r})
        options = VllmOptions(model="m", dtype="float32", python={str(stub())!r})
        VllmProcess(options, log=here / "log", folder=here / "weights").start(lambda seconds: None)
        print("ready", flush=True); time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
    child = int((tmp_path / "child").read_text())
    trainer.kill()
    trainer.wait()
    assert gone(child)
    for _ in range(50):
        if not (tmp_path / "weights").exists():
            break
        time.sleep(0.1)
    assert not (tmp_path / "weights").exists()


def test_no_vllm_or_one_that_is_too_old(stub: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no vLLM; pip install 'opdkit\[vllm\]'"):
        find_vllm(sys.executable)
    with pytest.raises(UserError, match=r"vLLM 0\.11\.2, which is too old: opdkit needs 0\.32"):
        find_vllm(str(stub("0.11.2")))
    with pytest.raises(UserError, match="cannot be run"):
        find_vllm(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ValueError: Free memory on device (1.2/79 GiB) is less than desired GPU memory utilization", "out of memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "gpu_memory_utilization"),
        ("ValueError: To serve the model's max seq len (40960), KV cache is needed", "sampling.vllm.max_model_len"),
        ("api_server.py: error: unrecognized arguments: --nothing", "extra_args"),
        ("(EngineCore pid=7) RuntimeError: Engine core died\\nKeyError: 'x'", "vLLM ended while it started"),
    ],
)
def test_what_it_died_of(said: str, words: str, tmp_path: Path) -> None:
    sentence = why(said, tmp_path / "log", VllmOptions(model="m", dtype="float32"))
    assert words in sentence and str(tmp_path / "log") in sentence


def test_the_guard_lets_nobody_in_but_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware that vLLM loads, called as a server calls it. That vLLM loads it: `make test-vllm`."""
    sys.path.append(str(HERE / "in_vllm"))
    from opdkit_guard import Guard

    monkeypatch.setenv("VLLM_API_KEY", "k")
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    def ask(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> None:
        asyncio.run(Guard(app)({"type": kind, "path": path, "headers": headers}, None, send))

    ask("/v1/realtime", kind="websocket")
    for path in ("/collective_rpc", "/sleep", "/v1/models", "/metrics", "/healthy", "//health"):
        ask(path)
        ask(path, (b"authorization", b"Bearer"))
    assert not reached and {401, None} == {*sent}
    ask("/health")
    ask("/collective_rpc", (b"authorization", b"Bearer k"))
    assert reached == ["/health", "/collective_rpc"]
