"""A teacher that a real vLLM process on this CPU holds: `make test-vllm`, outside `make test`. A tiny model with random
weights, in float32. The stock connector of hidden states, and a GPU, are not run here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdkit.engines.hf import HFEngine
from opdkit.engines.scratch import bpe_tokenizer, make_model
from opdkit.errors import UserError
from opdkit.losses import head_stats
from opdkit.recipe import Recipe, parse_recipe
from opdkit.training.parts import Parts
from opdkit.types import Asked

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("OPDKIT_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
START_S = 900.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 numbers, the least that vLLM's CPU attention takes; a tokenizer that knows every byte."""
    folder = tmp_path_factory.mktemp("vllm") / "teacher"
    texts = [f"What is {a} plus {b}? The sum is {a + b}." for a in range(30) for b in range(5)]
    make_model(
        folder,
        tokenizer=bpe_tokenizer(texts, 400),
        hidden_size=128,
        num_layers=2,
        seed=1,
        max_positions=256,
    )
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, the folder of its hidden states)"""
    spool = tmp_path_factory.mktemp("spool")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    states = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
    }
    transfer = {
        "kv_connector": "CPUHiddenStates",
        "kv_connector_module_path": "opdkit_hidden_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(spool)},
    }
    flags = {
        "host": "127.0.0.1", "port": port, "model": model, "served-model-name": "m", "dtype": "float32",
        "max-model-len": 128, "max-num-batched-tokens": 2048, "kv-cache-memory-bytes": 100_000_000,
        "max-logprobs": 64, "generation-config": "vllm", "uvicorn-log-level": "warning",
        "speculative-config": json.dumps(states), "kv-transfer-config": json.dumps(transfer),
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"]
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    own = {"VLLM_CPU_OMP_THREADS_BIND": "0", "PYTHONPATH": str(ROOT / "opdkit/engines/servers/in_vllm")}
    log = (spool.parent / "vllm.log").open("wb")
    process = subprocess.Popen(
        [*command, "--no-enable-chunked-prefill", "--disable-uvicorn-access-log"],
        env={**os.environ, **quiet, **own}, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        url, started = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < started + START_S, Path(log.name).read_text()[-3000:]
            time.sleep(1)
        print(f"\nthe teacher's vLLM answered after {time.monotonic() - started:.0f} s")
        yield url, spool
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def recipe_of(model: Path, server: tuple[str, Path], payload: str, path: Path | None = None) -> Recipe:
    url, spool = server
    teacher: dict[str, Any] = {"kind": "server", "url": url, "path": str(path or model), "payload": payload}
    method: dict[str, Any] = {"name": "opd"}
    if payload == "hidden":
        teacher["spool"] = str(spool)
    else:
        method |= {"support": "sampled"} if payload == "sampled" else {
            "support": "teacher_topk", "k": 8, "divergence": "forward_kl"}  # fmt: skip
    return parse_recipe(
        {
            "name": "run",
            "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
            "teacher": teacher,
            "data": {"train": "arithmetic:add-3:train", "task": "arithmetic", "limit": 40},
            "sampling": {"max_answer_tokens": 32},
            "method": method,
            "train": {"steps": 1, "problems_per_step": 2},
        }
    )


@pytest.mark.parametrize(
    ("payload", "asked", "most"),
    [("hidden", Asked("distribution"), 1e-4), ("topk", Asked("topk", 8), 1e-4), ("sampled", Asked("sampled"), 1e-4)],
)
def test_what_it_says_is_what_the_model_says_here(
    payload: str, asked: Asked, most: float, model: Path, server: tuple[str, Path]
) -> None:
    """Hidden states over the whole vocabulary; lists and own tokens. Rows of many lengths, two with one context."""
    parts = Parts(recipe_of(model, server, payload), None)
    teacher = parts.teacher
    assert teacher is not None
    draw = np.random.default_rng(0)
    end = parts.student.num_tokens
    contexts = [draw.integers(10, end, size).tolist() for size in (9, 9, 14, 40)]
    answers = [draw.integers(10, end, size).tolist() for size in (30, 1, 60, 17)]
    contexts[1] = contexts[0]
    said = teacher.score(contexts, answers, asked, temperature=1.0)
    here = HFEngine(parts.student).score(contexts, answers, asked)
    gap = 0.0
    for there, ours, answer in zip(said, here, answers, strict=True):
        if payload == "hidden":
            assert there.hidden_TH is not None and ours.hidden_TH is not None and len(there.hidden_TH) == len(answer)
            whole = [head_stats(one.hidden_TH, one.head, k=end) for one in (there, ours)]
            lines = [
                torch.zeros(len(answer), end).scatter(1, one.topk_ids_NK, one.topk_logprob_NK)  # type: ignore[arg-type]
                for one in whole
            ]
            gap = max(gap, float((lines[0] - lines[1]).abs().max()))
        else:
            gap = max(gap, float(np.abs(there.sampled_logprob_T - ours.sampled_logprob_T).max()))  # type: ignore[operator]
        if payload == "topk":
            gap = max(gap, float(np.abs(there.topk_logprob_TK - ours.topk_logprob_TK).max()))  # type: ignore[operator]
            assert (there.topk_ids_TK == ours.topk_ids_TK).mean() > 0.95  # but for ties
    cost = {metric.name: metric.value for metric in teacher.metrics()}
    print(f"\n{payload}: largest difference {gap:.2g} nats; {cost}")
    assert gap < most
    assert payload != "hidden" or not any(server[1].iterdir())


def test_another_model_behind_the_address_is_refused(model: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    """Of the same tokenizer and size: only its numbers tell."""
    from transformers import AutoTokenizer

    make_model(
        tmp_path / "other",
        tokenizer=AutoTokenizer.from_pretrained(model),
        hidden_size=128,
        num_layers=2,
        seed=2,
        max_positions=256,
    )
    with pytest.raises(UserError, match="it serves another model"):
        Parts(recipe_of(model, server, "hidden", tmp_path / "other"), None)
