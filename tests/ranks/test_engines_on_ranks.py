"""What stands beside the trainer, on ranks: answers that lag, what teachers said kept and read again, and engines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import opdkit
from some_runs import apart, command, steps, trained, weights

from opdkit.recipe import Recipe
from opdkit.recipe.replay import replay_recipe
from opdkit.run.rows import load_rows

sys.path.append(str(Path(__file__).parent.parent / "engines" / "servers"))
from fake_server import FakeServer

pytestmark = pytest.mark.ranks
Make = Callable[..., Recipe]
SHORT = ("train.steps=3", "train.problems_per_step=3", "sampling.max_answer_tokens=8", "diagnostics.every=0")
TWO = ("--ranks", "2")


def rows(run: Path, step: int) -> list[object]:
    found = load_rows(run / f"rows/step_{step:06d}.parquet")
    return [(row.rollout.key, row.rollout.policy_version, row.rollout.answer_ids) for row in found]


def test_answers_lag_on_ranks_as_in_one_process(recipe: Make) -> None:
    """The first two steps learn from answers of the weights that all began with. A run that was stopped with answers
    waiting goes on with them, on as many ranks to the same bits."""
    chosen = (*SHORT, "sampling.lag=1", "train.save_every=1", "train.keep_checkpoints=9", "train.steps=4")
    alone = trained(recipe("opd", *chosen, "name=alone"))
    whole = trained(recipe("opd", *chosen, "name=whole"), *TWO)
    assert [line["rollout/lag"] for line in steps(whole)] == [0, 1, 1, 1]
    assert all(rows(whole, step) == rows(alone, step) for step in (1, 2))
    assert apart(weights(whole, 2), weights(alone, 2)) < 1e-5
    for flags in (TWO, ()):
        part = shutil.copytree(whole, whole.with_name(f"part-{len(flags)}"))
        for later in (3, 4):
            shutil.rmtree(part / f"checkpoints/step_{later:06d}")
        assert (part / "checkpoints/step_000002/queue/step_000002.parquet").exists()
        assert trained(recipe("opd", *chosen, f"name={part.name}"), *flags, "--resume") == part
        assert rows(part, 3) == rows(whole, 3)
        assert apart(weights(part, 4), weights(whole, 4)) <= (0 if flags else 1e-5)


@pytest.mark.parametrize("strategy", ["gathered", "sharded"])
def test_a_spool_of_ranks_is_read_again(strategy: str, recipe: Make) -> None:
    """Each keeps what it heard of its own rows. Read again by as many ranks it gives the same weights to the bit, by
    one process to rounding. The teacher moves, so its head is another one in every step."""
    chosen = ("opsd", "teacher.weights=ema", "teacher.ema_rate=0.5", *SHORT, f"parallel.strategy={strategy}")
    run = trained(recipe(*chosen, "spool.max_gib=1"), *TWO)
    assert len([*(run / "spool").glob("step_*-of-00002.safetensors")]) == 6
    assert len([*(run / "spool").glob("head_*")]) == 3
    assert replay_recipe(run).train.steps == 3
    for flags in (TWO, ()):
        line = ["replay", str(run), "--name", f"again-{len(flags)}", *flags]
        done = opdkit(*line)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        again = run.with_name(f"again-{len(flags)}")
        assert rows(again, 3) == rows(run, 3)
        assert apart(weights(again, 3), weights(run, 3)) <= (0 if flags else 1e-5)


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[FakeServer]:
    with FakeServer(models["student"]) as fake:
        yield fake


def at(server: FakeServer) -> tuple[str, ...]:
    return (*SHORT, "sampling.engine=server", f"sampling.url={server.url}", "train.lr=0.01")


def test_two_ranks_ask_one_engine(recipe: Make, server: FakeServer) -> None:
    """Weights are published and proved once an update, and each rank asks for its own rows, while the trainers work:
    the lag is one step. What the teacher says is kept. The engine is a fake one with a real tiny model."""
    run = trained(recipe("opd", *at(server), "sampling.lag=1", "spool.max_gib=1"), *TWO)
    assert [line["rollout/lag"] for line in steps(run)] == [0, 1, 1]
    for line in steps(run)[:2]:  # nothing is sampled in the last step
        assert line["rollout/probe_gap_p999"] < 1e-3 and line["rollout/num_engine_restarts"] == 0
    assert len(server.asked("/update_weight_version")) == 2
    assert len(server.asked("/inference/v1/generate")) == 2 * 4 + 3 * 6
    assert replay_recipe(run).train.steps == 3
    assert not list((run / "sampler").glob("*"))


@pytest.mark.parametrize(
    "keys", [("parallel.strategy=sharded",), ("model.lora={r=4, alpha=8}",)], ids=["parts", "lora"]
)
def test_every_update_reaches_the_engine_of_ranks(keys: tuple[str, ...], recipe: Make, server: FakeServer) -> None:
    """Whole weights of layers that are in parts, and adapters; the learning rate is high, so that old weights would
    show by tenths of nats."""
    run = trained(recipe("opd", *at(server), *keys), *TWO)
    for line in steps(run):
        assert line["rollout/probe_gap_p999"] < 1e-3 and line["rollout/sampler_gap_p999"] < 1e-3
    alone = trained(recipe("opd", *at(server), "name=alone", *(key for key in keys if "lora" in key)))
    assert rows(run, 1) == rows(alone, 1)


@pytest.mark.parametrize("keys", [(), ("sampling.lag=1",)], ids=["in turn", "lagging"])
def test_the_engine_is_restarted_under_ranks(keys: tuple[str, ...], recipe: Make, server: FakeServer) -> None:
    """In mid-step it has the weights it began with: whichever rank finds it, the host publishes the student's again,
    and the run has the numbers of one in which nothing happened."""
    plain = trained(recipe("opd", *at(server), *keys, "name=plain"), *TWO)
    count = 0

    def restart() -> None:
        nonlocal count
        count += 1
        if count == 4 + 6 + 4 + 5:
            server._base, server._cached, server.weight_version = server._load(server.folder), {}, "default"

    server.before_answer = restart
    broken = trained(recipe("opd", *at(server), *keys, "name=broken"), *TWO)
    versions = [body["new_version"] for body in server.asked("/update_weight_version")]
    assert len(versions) == len(set(versions)) + 1, "one was published again, once"
    assert apart(weights(broken, 3), weights(plain, 3)) == 0


def test_an_engine_that_is_not_the_students_is_refused_once(recipe: Make, models: dict[str, Path]) -> None:
    with FakeServer(models["student"], raw_logprobs=True) as wrong:
        chosen = recipe("opd", *at(wrong))
        done = opdkit(*command(chosen, *TWO))
    assert done.returncode == 2 and done.stderr.count("error ") == 1, done.stderr
    assert "are not the student's of step 0" in done.stderr
