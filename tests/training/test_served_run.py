"""Whole runs whose student samples behind a server: weights arrive and are proved, answers may lag, runs resume. The
server is a fake one with a real tiny model; `make test-vllm` does the same with vLLM."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from opdkit.engines.servers.vllm import Vllm
from opdkit.errors import UserError
from opdkit.recipe import Recipe, warnings
from opdkit.run.rows import load_rows
from opdkit.training.loop import train

sys.path.append(str(Path(__file__).parent.parent / "engines" / "servers"))
from fake_server import FakeServer

LORA = "model.lora={r=4, alpha=8}"


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[FakeServer]:
    with FakeServer(models["student"]) as fake:
        yield fake


@pytest.fixture
def served(recipe: Callable[..., Recipe], server: FakeServer) -> Callable[..., Recipe]:
    def make(*overrides: str, method: str = "opd", steps: int = 3) -> Recipe:
        own = ("sampling.engine=server", f"sampling.url={server.url}", f"train.steps={steps}", "train.lr=0.01")
        return recipe(method, *own, "sampling.max_answer_tokens=8", *overrides)

    return make


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "train/loss" in line]


def numbers(recipe: Recipe) -> list[dict[str, Any]]:
    """What two equal runs have in common: all but clocks and memory."""
    return [{k: v for k, v in line.items() if k.split("/")[0] not in ("time", "memory")} for line in lines(recipe)]


@pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
def test_every_update_arrives(served: Callable[..., Recipe], server: FakeServer, console: Console, lora: tuple) -> None:
    """The gap to the trainer stays below 1e-3 after every update, whole weights and adapters; each row says of which
    weights it is. The learning rate is high, so that old weights would show by tenths of nats."""
    run = served(*lora)
    train(run, console=console)
    for line in lines(run):
        assert line["rollout/probe_gap_p999"] < 1e-3 and line["rollout/sampler_gap_p999"] < 1e-3
        assert line["rollout/num_engine_restarts"] == 0 and line["rollout/lag"] == 0
        assert line["rollout/ess"] == pytest.approx(1, abs=1e-5)
    versions = [
        {e.rollout.policy_version for e in load_rows(run.run_dir / f"rows/step_00000{s}.parquet")} for s in (1, 2, 3)
    ]
    assert versions == [{0}, {1}, {2}]
    assert not list((run.run_dir / "sampler").glob("*"))
    if lora:
        names = [body["lora_name"] for body in server.asked("/v1/load_lora_adapter")]
        folders = [body["lora_path"] for body in server.asked("/v1/load_lora_adapter")]
        assert len(set(names)) == len(set(folders)) == 3 == len(server.asked("/v1/unload_lora_adapter"))


@pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
def test_weights_reach_sglang(
    recipe: Callable[..., Recipe], models: dict[str, Path], console: Console, lora: tuple
) -> None:
    """As its sources say; SGLang itself was never run."""
    with FakeServer(models["student"], kind="sglang", version="0.5.3") as server:
        own = ("sampling.engine=server", f"sampling.url={server.url}", "sampling.server_kind=sglang")
        run = recipe("opd", *own, "train.steps=2", "train.lr=0.01", "sampling.max_answer_tokens=4", *lora)
        train(run, console=console)
    assert max(line["rollout/probe_gap_p999"] for line in lines(run)) < 1e-3


def test_a_stale_cache_stops_the_step(
    served: Callable[..., Recipe], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights without a reset of the prefix cache give wrong numbers and no error: the probe finds them."""
    monkeypatch.setattr(
        Vllm, "forget", lambda self, version: self._dev("/update_weight_version", {"new_version": version})
    )
    with pytest.raises(UserError, match="the engine's log-probs are not the student's of step 1"):
        train(served("train.lr=0.1"), console=console)


def test_a_server_with_another_model(
    recipe: Callable[..., Recipe], models: dict[str, Path], console: Console, tmp_path: Path
) -> None:
    """An adapter over another base: of the same shape, so that nothing but the numbers says so."""
    folder = tmp_path / "other"
    shutil.copytree(models["student"], folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with FakeServer(folder) as server, pytest.raises(UserError, match="not the student's of step 0"):
        train(recipe("opd", "sampling.engine=server", f"sampling.url={server.url}", LORA), console=console)


@pytest.mark.parametrize(
    ("how", "words"),
    [({"raw_logprobs": True}, "not the student's of step 0"), ({"dev": False}, "VLLM_SERVER_DEV_MODE=1")],
)
def test_wrong_servers(
    recipe: Callable[..., Recipe], models: dict[str, Path], console: Console, how: dict[str, Any], words: str
) -> None:
    """One that reports log-probs from before the temperature, one that cannot be updated."""
    with FakeServer(models["student"], **how) as server, pytest.raises(UserError, match=words):
        train(recipe("opd", "sampling.engine=server", f"sampling.url={server.url}"), console=console)


def test_two_runs_on_one_server(served: Callable[..., Recipe], server: FakeServer, console: Console) -> None:
    """Another one's weights come in the middle of a step: their version says whose they are."""
    run = served()
    count = 0

    def intrude() -> None:
        nonlocal count
        count += 1
        if count == 8:
            server.weight_version = "other-7"

    server.before_answer = intrude
    with pytest.raises(UserError, match="another run updates the same server"):
        train(run, console=console)


def test_the_server_is_restarted_in_mid_step(
    served: Callable[..., Recipe], server: FakeServer, console: Console, tmp_path: Path
) -> None:
    """It comes back with the weights it began with: the student's are published again, and the run has the numbers of
    one in which nothing happened."""
    plain = served("name=plain")
    train(plain, console=console)
    broken, count = served("name=broken"), 0

    def restart() -> None:
        nonlocal count
        count += 1
        if count == 21:
            server._base, server._cached, server.weight_version = server._load(server.folder), {}, "default"

    server.before_answer = restart
    train(broken, console=console)
    assert [line["train/loss"] for line in lines(broken)] == [line["train/loss"] for line in lines(plain)]


@pytest.mark.parametrize("engine", ["hf", "server"])
def test_lag_is_fixed_and_resumes_to_the_same_numbers(
    recipe: Callable[..., Recipe], served: Callable[..., Recipe], console: Console, engine: str
) -> None:
    """Step t learns from answers of step t - 1; a run that was stopped with answers waiting goes on with them."""
    make = (lambda *o: served(*o, steps=4)) if engine == "server" else (lambda *o: recipe("opd", "train.steps=4", *o))
    whole = make("sampling.lag=1", "name=whole")
    train(whole, console=console)
    assert [line["rollout/lag"] for line in lines(whole)] == [0, 1, 1, 1]
    assert all(line["rollout/sampler_gap_mean"] is None for line in lines(whole)[1:])
    assert all(0 < line["rollout/ess"] < 1 for line in lines(whole)[1:])

    class Stop(Exception):
        pass

    def stop(step: int, metrics: Any) -> None:
        if step == 3:
            raise Stop

    part = make("sampling.lag=1", "name=part")
    with pytest.raises(Stop):
        train(part, console=console, on_step=stop)
    assert (part.run_dir / "checkpoints/step_000003/queue/step_000003.parquet").exists()
    train(part, console=console, resume=True)
    assert numbers(part) == numbers(whole)
    fresh = make("name=fresh")
    train(fresh, console=console)
    assert lines(fresh)[1]["train/loss"] != lines(whole)[1]["train/loss"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampling.engine=server"], "needs sampling.url"),
        (["sampling.url=http://h:1"], 'only read with sampling.engine = "server"'),
        (["sampling.engine=vllm", "sampling.min_p=0.1", "sampling.top_p=0.9"], "cut in another order in vLLM"),
        (["sampling.engine=vllm", "sampling.when_idle=sleep", "sampling.lag=1"], "never idle"),
        (["sampling.engine=vllm", "sampling.vllm.max_model_len=16"], "leaves no room for a prompt"),
        (["sampling.engine=vllm", 'sampling.vllm.extra_args=["--port=1"]'], "is set by opdkit"),
        (["sampling.engine=vllm", "sampling.vllm.quantization=fp8"], "quantises once"),
        (
            ["sampling.engine=server", "sampling.url=http://h:1", "sampling.server_kind=sglang", "sampling.top_p=0.9"],
            "SGLang reports log-probs from before",
        ),
        (["sampling.lag=1", "method.support=sampled"], "add \\[weights\\] importance"),
        (["sampling.lag=9"], "every answer would come from the first weights"),
    ],
)
def test_what_cannot_work_is_refused_before_models_load(
    recipe: Callable[..., Recipe], overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        recipe("opd", *overrides)


def test_check_says_what_a_lag_needs(recipe: Callable[..., Recipe]) -> None:
    assert any("under the current student" in said for said in warnings(recipe("opd", "sampling.lag=1")))
    corrected = recipe("opd", "sampling.lag=1", "method.support=sampled", "weights.importance={}")
    assert any("corrects for it" in said for said in warnings(corrected))


def test_episodes_of_a_served_student(
    served: Callable[..., Recipe], server: FakeServer, console: Console, tmp_path: Path
) -> None:
    """Every turn is asked of the server with the whole stream before it; what it says of the model's tokens is what the
    trainer says of the row, and episodes go ahead without each other."""
    (tmp_path / "talk.py").write_text(
        "from opdkit.rollouts.environments.base import Step\n"
        "class Talk:\n"
        "    tools = ()\n"
        "    def reset(self, problem, seed):\n"
        "        self.turn = 0\n"
        "        return problem.messages\n"
        "    def step(self, action, seed):\n"
        "        self.turn += 1\n"
        "        said = [{'role': 'user', 'content': str(seed % 100)}]\n"
        "        return Step(messages=said, done=self.turn == 3, reward=1.0)\n"
    )
    run = served(f"episode.environment={tmp_path / 'talk.py'}", "episode.workers=1", steps=2)
    train(run, console=console)
    for line in lines(run):
        assert line["rollout/turns"] == 3 and line["rollout/max_logprob_gap"] < 1e-3
    for path in sorted((run.run_dir / "rows").glob("*.parquet")):
        assert all(row.rollout.reward == 3.0 and row.rollout.ended == "done" for row in load_rows(path))
