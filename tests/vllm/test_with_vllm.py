"""opdkit with a real vLLM process on this CPU: `make test-vllm`, outside `make test`. A tiny model with random weights,
in float32 on one thread, where equal tokens are promised. What needs a GPU is not run here (docs/guides/vllm.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.servers.engine import ServerEngine
from opdkit.engines.servers.http import KEY_VARIABLE
from opdkit.engines.servers.process import VllmOptions, VllmProcess
from opdkit.engines.servers.served import Served
from opdkit.recipe import Recipe, parse_recipe
from opdkit.training.loop import train
from opdkit.training.models.student_server import vocabulary_of

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("OPDKIT_VLLM_PYTHON", str(Path(__file__).parents[2] / ".venv-vllm/bin/python"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student; its teacher stands beside it. Heads of 32 numbers, the least that vLLM's CPU attention takes; more
    rows than the tokenizer has ids."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from opdkit.engines.scratch import char_tokenizer
    from opdkit.tasks import arithmetic

    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = char_tokenizer(arithmetic.ALPHABET + "()")
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        module = Qwen3ForCausalLM(config)
        module.generation_config = GenerationConfig(eos_token_id=[4, 0], pad_token_id=0)
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "student"


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """One for the tests that do not end it: weights can be replaced, and adapters loaded."""
    folder = tmp_path_factory.mktemp("server")
    extra = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
    options = VllmOptions(model=str(model), dtype="float32", python=PYTHON, extra_args=extra)
    process = VllmProcess(options, log=folder / "vllm.log", folder=folder / "weights")
    with one_thread():
        started = time.monotonic()
        key = process.start(lambda seconds: None)._token
        print(f"\nvLLM {process.found.version} answered after {time.monotonic() - started:.0f} s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, key or "")  # as whoever uses a running server sets it
        yield process
    process.stop()


class one_thread:
    """Of the engine, as float32 rows are then the same whoever is in the batch."""

    def __enter__(self) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"

    def __exit__(self, *_: Any) -> None:
        del os.environ["VLLM_CPU_OMP_THREADS_BIND"]


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(*overrides: str, steps: int = 6) -> Recipe:
        raw = {
            "name": "run",
            "seed": 3,
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
            "teacher": {"kind": "model", "path": str(model.parent / "teacher")},
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 40},
            "sampling": {"max_answer_tokens": 24, "group_size": 2},
            "method": {"name": "opd"},
            "train": {"steps": steps, "problems_per_step": 4, "lr": 1e-2, "save_every": 1},
        }
        return parse_recipe(raw, list(overrides))

    return make


def at(server: VllmProcess) -> tuple[str, str]:
    assert server.url is not None
    return "sampling.engine=server", f"sampling.url={server.url}"


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "train/loss" in line]


# The adapters first: they need the base that the server began with.
@pytest.mark.parametrize("lora", [("model.lora={r=4, alpha=8}",), ()], ids=["lora", "full"])
def test_the_engine_has_the_trainers_weights_after_each_of_five_updates(
    recipe: Callable[..., Recipe], server: VllmProcess, console: Console, lora: tuple[str, ...]
) -> None:
    run = recipe(*at(server), *lora)
    train(run, console=console)
    probe = [line["rollout/probe_gap_p999"] for line in lines(run)]
    rows = [line["rollout/sampler_gap_p999"] for line in lines(run)]
    print(f"\nlargest gap of the probe, before and after 5 updates: {', '.join(f'{gap:.1e}' for gap in probe)}")
    print(f"99.9th percentile over the step's own answers: {', '.join(f'{gap:.1e}' for gap in rows)}")
    seconds = [line["time/publish_s"] for line in lines(run)]
    print(f"publishing and proving: {', '.join(f'{one:.2f} s' for one in seconds)}")
    assert len(probe) == 6 and max(probe) < 1e-3 and max(rows) < 1e-3
    losses = [line["train/loss"] for line in lines(run)]
    assert len(set(losses)) == 6  # something was learned in between


def test_a_run_with_lag_resumes_to_the_same_numbers(
    recipe: Callable[..., Recipe], server: VllmProcess, console: Console
) -> None:
    whole, part = (recipe(*at(server), "sampling.lag=1", f"name={name}", steps=4) for name in ("whole", "part"))
    train(whole, console=console)

    class Stop(Exception):
        pass

    def stop(step: int, metrics: Any) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(part, console=console, on_step=stop)
    train(part, console=console, resume=True)
    keys = ("train/loss", "train/grad_norm", "rollout/lag", "rollout/answer_tokens")
    numbers = [[line[key] for key in keys] for line in lines(part)]
    shares = [[line["rollout/ess"] for line in lines(run)] for run in (part, whole)]
    print(f"\nlag {[n[2] for n in numbers]}, effective share of the sample {[round(share, 4) for share in shares[0]]}")
    assert numbers == [[line[key] for key in keys] for line in lines(whole)]
    # vLLM's log-probs are the same to the last bits only: what else is in the batch is not.
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)


def test_an_engine_that_is_killed_in_mid_step_changes_no_number(
    recipe: Callable[..., Recipe], server: VllmProcess, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sampling.engine = "vllm": opdkit starts it, `kill -9` ends it between two answers of the second step, and it is
    started again. Nothing of it is left behind the run."""
    plain = recipe(*at(server), "name=plain", steps=3)
    train(plain, console=console)
    engines: list[VllmProcess] = []
    start, answer, count = VllmProcess.start, ServerEngine._answer, 0

    def started(process: VllmProcess, waiting: Any) -> Any:
        engines.append(process)
        return start(process, waiting)

    def answered(engine: ServerEngine, row: Any, params: SamplingParams) -> Any:
        nonlocal count
        count += 1
        if count == 4 + 8 + 4 + 3:  # probe, step, probe, and three rows of the next
            (api,) = children(engines[0].pid)
            os.kill(api, signal.SIGKILL)
        return answer(engine, row, params)

    monkeypatch.setattr(VllmProcess, "start", started)
    monkeypatch.setattr(ServerEngine, "_answer", answered)
    own = ("sampling.engine=vllm", f"sampling.vllm.python={PYTHON}", "sampling.vllm.max_model_len=512")
    killed = recipe(*own, "name=killed", steps=3)
    with one_thread():
        train(killed, console=console)
    assert [line["rollout/num_engine_restarts"] for line in lines(killed)] == [0, 1, 0]
    assert [line["train/loss"] for line in lines(killed)] == [line["train/loss"] for line in lines(plain)]
    print(f"\n{len(engines)} starts; losses of both runs: {[line['train/loss'] for line in lines(killed)]}")
    assert not [line for line in processes() if str(killed.model.path) in line and str(server.url)[-5:] not in line]
    assert not engines[0].folder.exists() and (killed.run_dir / "vllm.log").stat().st_size > 0


def test_an_engine_ends_with_its_trainer(model: Path, tmp_path: Path) -> None:
    """`kill -9` of the trainer while the engine starts: no process is left, and no weights in shared memory."""
    code = (
        "import sys; from pathlib import Path; from opdkit.engines.servers.process import *\n"
        f"o = VllmOptions(model={str(model)!r}, dtype='float32', python={PYTHON!r})\n"
        f"p = VllmProcess(o, log=Path({str(tmp_path / 'log')!r}), folder=Path({str(tmp_path / 'weights')!r}))\n"
        "p.start(lambda s: print('waiting', flush=True))\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    trainer.stdout.readline()
    time.sleep(5)
    (keeper,) = children(trainer.pid)
    (engine,) = children(keeper)
    trainer.kill()
    trainer.wait()
    for _ in range(150):
        if not (Path(f"/proc/{engine}").exists() or Path(f"/proc/{keeper}").exists()):
            break
        time.sleep(0.2)
    assert not Path(f"/proc/{engine}").exists() and not (tmp_path / "weights").exists()


def test_tokens_a_second_beside_the_engine_here(model: Path, server: VllmProcess) -> None:
    """32 rows at once, the engines in turn. Only that both do the work; the figures are printed."""
    import torch

    from opdkit.engines.model import LanguageModel

    here = LanguageModel.load(model, dtype=torch.float32, device="cpu")
    served = Served(vocabulary=vocabulary_of(here), url=server.url)
    served.open()
    prompts = [[5 + (row * 7 + place) % 15 for place in range(40)] for row in range(32)]
    params, rates = SamplingParams(max_answer_tokens=128), {"vllm": [], "hf": []}
    for turn in range(3):
        for name, engine in (("vllm", served.engine()), ("hf", HFEngine(here))):
            started = time.monotonic()
            rows = engine.sample(prompts, [turn * 100 + row for row in range(32)], params)
            rates[name].append(sum(len(row.answer_ids) for row in rows) / (time.monotonic() - started))
    for name, found in rates.items():
        print(f"\n{name}: {', '.join(f'{rate:.0f}' for rate in found)} tokens/s (median {np.median(found):.0f})")
    assert all(rate > 0 for found in rates.values() for rate in found)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(one) for one in found.stdout.split()]


def processes() -> list[str]:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in found if "vllm.entrypoints" in line]
