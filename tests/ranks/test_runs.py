"""Whole runs of `opdkit train --ranks N`: beside one process, from one number of ranks to another, and ended midway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Started, opdkit, warm
from some_runs import apart, command, steps, trained, weights

from opdkit import toml
from opdkit.metric_lines import read_metrics, went_back
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.saved.checkpoint import latest

pytestmark = pytest.mark.ranks
Make = Callable[..., Recipe]
# The published sentences hold characters that the tiny tokenizer does not know.
WORDING = "context.wording={ layout = '{question}{success}{another}{failure}', " + ", ".join(
    f"{kind} = ';{{text}}'" for kind in ("success", "another", "failure", "feedback", "summary", "failed_summary")
)
EMA_VIEW = ("views.average.teacher={ kind = 'self', weights = 'ema', ema_rate = 0.1 }",)
TARGET = "method.target={ teacher = 0.5, average = 0.5 }"
RUNS = {
    "opd": ("opd", *EMA_VIEW, TARGET, "model.lora.r=4", "model.lora.alpha=8"),
    "mopd": ("mopd", "context.kind=peers", "context.feedback=never", WORDING + " }", "train.warmup_steps=0"),
}
GATHERED, SHARDED = ("parallel.strategy=gathered",), ("parallel.strategy=sharded",)
COPIES = (*SHARDED, "parallel.hsdp=2")
KEPT = ("train.save_every=1", "train.keep_checkpoints=9", "train.steps=4")
EVALUATED = ("eval.data=arithmetic:merge-3:test", "eval.limit=4", "eval.samples=2")
OF_THE_SPLIT = ("time", "memory/", "metrics/", "rollout/occupancy", "rollout/rows_together", "rollout/evictions")


@pytest.mark.parametrize("strategy", [GATHERED, SHARDED], ids=["gathered", "sharded"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_ranks_is_that_of_one_process(
    name: str, strategy: tuple[str, ...], recipe: Make, capsys: Any
) -> None:
    """The first step's rows are equal, its metrics and the weights after it within 1e-5; how many answers of later
    steps are equal is printed. A random student earns no reward, so mopd's peers are shown as failures."""
    alone = trained(recipe(*RUNS[name], *KEPT, *EVALUATED, "name=one"))
    together = trained(recipe(*RUNS[name], *KEPT, *EVALUATED, "name=two", *strategy), "--ranks", "2")
    assert sorted(path.name for path in together.iterdir()) == sorted([*(p.name for p in alone.iterdir()), "ranks"])
    first, second = steps(alone)[0], steps(together)[0]
    assert list(first) == list(second), "the same metrics in the same order"
    for metric, value in first.items():
        if not metric.startswith(OF_THE_SPLIT):
            assert second[metric] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), metric
    assert apart(weights(alone, 1), weights(together, 1)) < 1e-5
    shares = []
    for number in range(1, 5):
        pairs = list(
            zip(*(load_rows(run / f"rows/step_{number:06d}.parquet") for run in (alone, together)), strict=True)
        )
        equal = [
            (a.rollout.key, a.rollout.answer_ids, a.rollout.reward, {n: v.context_ids for n, v in a.views.items()})
            == (b.rollout.key, b.rollout.answer_ids, b.rollout.reward, {n: v.context_ids for n, v in b.views.items()})
            for a, b in pairs
        ]
        shares.append(sum(equal) / len(equal))
    assert shares[0] == 1
    with capsys.disabled():
        print(f"\n{name}: share of equal rows in steps 1 to 4: {', '.join(f'{share:.3f}' for share in shares)}")


@pytest.mark.parametrize(
    ("saved_on", "goes_on_with", "optimizer"),
    [
        ((2, GATHERED), ((2, GATHERED), (1, GATHERED), (4, GATHERED)), "adamw"),
        ((1, GATHERED), ((2, GATHERED), (2, SHARDED)), "adamw"),
        ((4, COPIES), ((4, COPIES), (1, GATHERED), (2, SHARDED), (2, GATHERED)), "muon"),
    ],
    ids=["of two", "of one", "in parts"],
)
def test_a_checkpoint_goes_on_with_other_ranks(
    saved_on: tuple[int, tuple[str, ...]],
    goes_on_with: tuple[tuple[int, tuple[str, ...]], ...],
    optimizer: str,
    recipe: Make,
) -> None:
    """Continued from half of its steps: weights as of the uninterrupted run, to the bit on as many ranks that keep them
    as it did. An averaged teacher and the optimizer's moments are in the checkpoint."""
    chosen = ("opsd", "teacher.weights=ema", "teacher.ema_rate=0.1", "train.schedule=constant", *KEPT)
    chosen = (*chosen, f"train.optimizer={optimizer}", f"train.save_in_background={str(optimizer == 'muon').lower()}")
    flags: dict[int, tuple[str, ...]] = {1: (), **{num: ("--ranks", str(num)) for num in (2, 4)}}
    whole = trained(recipe(*chosen, "name=whole", *saved_on[1]), *flags[saved_on[0]])
    for num_ranks, strategy in goes_on_with:
        half = shutil.copytree(whole, whole.with_name(f"half-{num_ranks}-{len(strategy)}-{strategy[0][18:]}"))
        for later in (3, 4):
            shutil.rmtree(half / f"checkpoints/step_{later:06d}")
        assert trained(recipe(*chosen, f"name={half.name}", *strategy), *flags[num_ranks], "--resume") == half
        distance = apart(weights(whole, 4), weights(half, 4))
        rounding = (
            5e-5 if optimizer == "muon" else 1e-6
        )  # Muon's iteration rounds to bfloat16 (docs/guides/parallel.md)
        assert distance <= (0 if saved_on == (num_ranks, strategy) else rounding), (num_ranks, strategy)
        last = latest(half / "checkpoints")
        assert last is not None and last.step == 4 and set(last.files) == {"optimizer", "teacher"}


@pytest.fixture
def begun(recipe: Make) -> Any:
    """A long run on two ranks, some steps after its first checkpoint: the launcher, its ranks, what it says, where."""
    started: list[Started] = []

    def start(*overrides: str) -> tuple[Started, list[int], Path]:
        long = recipe("opd", "train.steps=5000", "train.save_every=3", "train.save_rows_every=1", *overrides)
        launcher = warm().start(argv=command(long, "--ranks", "2"))
        started.append(launcher)
        wait_for(lambda: (long.run_dir / "rows/step_000005.parquet").exists() or not is_running(launcher.pid), 400)
        assert is_running(launcher.pid), launcher.wait()
        assert (long.run_dir / "rows/step_000005.parquet").exists(), "this machine is too slow"
        return launcher, children(launcher.pid), long.run_dir

    yield start
    for launcher in started:
        launcher.kill()


def children(parent: int) -> list[int]:
    """In the order they were started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("rank", "strategy"), [(0, GATHERED), (1, GATHERED), (1, SHARDED)])
def test_a_killed_rank_ends_the_others(rank: int, strategy: tuple[str, ...], begun: Any) -> None:
    """With one sentence and a folder that goes on. In less than 2 seconds on a machine that has nothing else to do; 10
    are allowed here."""
    launcher, ranks, folder = begun(*strategy)
    os.kill(ranks[rank], signal.SIGKILL)
    killed = time.monotonic()
    done = launcher.wait(60)
    assert time.monotonic() - killed < 10 and done.returncode == 1
    said = done.stderr
    assert said.count("error ") == 1 and f"error rank {rank} of 2 was ended by SIGKILL" in said and "--resume" in said
    assert not any(map(is_running, ranks)) and latest(folder / "checkpoints") is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_that_hangs_ends_the_run(begun: Any) -> None:
    launcher, ranks, folder = begun("parallel.timeout_minutes=0.5")
    os.kill(ranks[1], signal.SIGSTOP)
    done = launcher.wait(120)
    assert done.returncode == 1 and "rank 1 of 2 did not answer the others" in done.stderr
    assert not any(map(is_running, ranks)) and latest(folder / "checkpoints") is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_launcher_leaves_no_ranks(begun: Any) -> None:
    launcher, ranks, _ = begun()
    launcher.kill()
    wait_for(lambda: not any(map(is_running, ranks)), 5)
    assert not any(map(is_running, ranks))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_finishes_the_step_on_all_ranks(begun: Any) -> None:
    launcher, ranks, folder = begun()
    os.kill(launcher.pid, signal.SIGINT)
    done = launcher.wait(60)
    said = done.stdout + done.stderr
    assert done.returncode == 130 and said.count("Stopping after this step") == 1
    assert f"Everything is saved in {folder}" in said and not any(map(is_running, ranks))
    last = latest(folder / "checkpoints")
    assert last is not None and last.step == len(steps(folder))


def test_more_ranks_than_rows_are_refused(recipe: Make) -> None:
    """Before anything is started, and nothing is left behind."""
    chosen = recipe("opd")
    done = opdkit(*command(chosen, "--ranks", "11"))
    assert done.returncode == 2 and "11 ranks are more than the 10 rows of a step" in done.stderr
    assert not chosen.run_dir.exists()


def test_a_refusal_is_said_once(recipe: Make, tmp_path: Path) -> None:
    """What all ranks find wrong is rank 0's to say; no folder is left."""
    chosen = recipe("opd", f"data.train={tmp_path / 'none.jsonl'}", "data.task=math")
    done = opdkit(*command(chosen, "--ranks", "2"))
    assert done.returncode == 2 and done.stderr.count("error ") == 1 and "none.jsonl" in done.stderr
    assert not chosen.run_dir.exists()


def test_a_pipeline_trains_on_ranks(recipe: Make, tmp_path: Path, models: dict[str, Path]) -> None:
    """Its stage is the run of `train --ranks`, and a finished one is skipped."""
    keys = recipe("opd", "train.steps=2").as_dict()
    stage = {key: keys[key] for key in ("model", "teacher", "data", "sampling", "method", "train", "seed")}
    file = tmp_path / "pipeline.toml"
    file.write_text(toml.dumps({"name": "pipe", "runs_dir": str(tmp_path / "runs"), "stage": [
        {"name": "opd", "kind": "train", "recipe": stage},
    ]}))  # fmt: skip
    line = ["pipeline", str(file), "--ranks", "2"]
    done = opdkit(*line)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    ours = trained(recipe("opd", "train.steps=2", "name=ours"), "--ranks", "2")
    assert apart(weights(ours, 2), weights(tmp_path / "runs/pipe/opd", 2)) == 0


def test_an_evaluation_on_ranks_has_the_answers_of_one_process(tmp_path: Path, models: dict[str, Path]) -> None:
    """Its last sentence and status are the command's; run again, it samples nothing anew."""
    line = ["evaluate", "--model", str(models["student"]), "--task", "arithmetic", "--data", "arithmetic:add-3:test"]
    line += ["--limit", "5", "-n", "3", "--max-answer-tokens", "8", "--at-least", "2"]
    answers = {}
    for name, more in {"alone": (), "together": ("--ranks", "2"), "again": ("--ranks=2", "-n", "4")}.items():
        out = tmp_path / ("alone" if name == "alone" else "together")
        done = opdkit(*line, *more, "--out", out)
        assert done.returncode == 1 and done.stderr.count("below --at-least") == 1, done.stderr[-3000:]
        _, *rows = (out / "arithmetic_add-3_test.jsonl").read_text().splitlines()
        answers[name] = {(row["problem_id"], row["sample_id"]): row for row in map(json.loads, rows)}
        assert len(rows) == len(answers[name]) == (20 if name == "again" else 15)
    assert answers["together"] == answers["alone"] == {key: answers["again"][key] for key in answers["alone"]}


def test_a_fit_on_ranks_has_the_numbers_of_one_process(recipe: Make, tmp_path: Path) -> None:
    """With an averaged teacher and layers in parts; rows of a part are shared."""
    chosen = recipe("opsd", "teacher.weights=ema", "teacher.ema_rate=0.1", *SHARDED)
    line = ["fit", command(chosen)[-1], "--problems", "5", "--samples", "3"]
    found = {}
    for name, more in {"one": (), "two": ("--ranks", "2")}.items():
        done = opdkit(*line, *more, "--out", tmp_path / name)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        found[name] = json.loads((tmp_path / name / "fit.json").read_text())
    assert found["two"]["verdict"] == found["one"]["verdict"]
    for fact, value in found["one"]["facts"].items():
        assert found["two"]["facts"][fact] == (pytest.approx(value, rel=1e-5) if type(value) is float else value), fact
    for one, two in zip(found["one"]["by_bucket"], found["two"]["by_bucket"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_torchrun(recipe: Make) -> None:
    """Its own output stands around ours; the run is the same. These are processes from the start, no forks."""
    chosen, ours = recipe("opd", "train.steps=2", "name=torchrun"), recipe("opd", "train.steps=2", "name=ours")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opdkit"]
    done = subprocess.run([*line, *command(chosen)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    line = [sys.executable, "-m", "opdkit", *command(ours, "--ranks", "2")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert apart(weights(ours.run_dir, 2), weights(chosen.run_dir, 2)) == 0


def test_ranks_with_other_recipes_are_refused(recipe: Make, tmp_path: Path) -> None:
    """Started with another learning rate on rank 1."""
    chosen = recipe("opd")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        f"sys.argv = ['opdkit', *{command(chosen)}, '--set', 'train.lr=0.00' + os.environ['RANK'] + '1']\n"
        "from opdkit.cli import main\n"
        "main()\n"
    )
    done = warm().run(script=str(script), job="", ranks=2)
    assert done.returncode == 2 and "rank 1 does not have the recipe of rank 0" in done.stderr
    assert not chosen.run_dir.exists()


def test_two_ranks_go_back_and_pause_together(recipe: Make) -> None:
    """The first rank decides: no rank hangs, none is a step apart. What was decided is one process's decision here,
    where the ranks' numbers are its numbers to 1e-5."""
    keys = ("teacher.weights=ema", "teacher.ema_rate=0.1", "train.lr=0.05", "train.schedule=constant", "train.steps=6",
            "train.problems_per_step=4", "train.warmup_steps=0", "train.save_every=3", "diagnostics.every=0",
            "sentinels.window=1", "sentinels.length=2.2")  # fmt: skip
    back = trained(
        recipe("opsd", *keys, "sentinels.action=rollback", "sentinels.lr_factor=0.001", "name=back"), "--ranks", "2"
    )
    assert [(one.from_step, one.to_step) for one in went_back(read_metrics(back / "metrics.jsonl"))] == [(5, 3)]
    saved = latest(back / "checkpoints")
    assert saved is not None and (saved.step, saved.attempt, saved.lr_factor) == (6, 2, 0.001)
    paused = recipe("opsd", *keys, "sentinels.action=pause", "name=paused")
    done = opdkit(*command(paused, "--ranks", "2"))
    assert done.returncode == 3 and "Paused. step 5" in done.stderr, done.stderr
