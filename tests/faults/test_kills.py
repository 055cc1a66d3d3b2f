"""kill -9, whenever: what a command makes is in the end what it makes undisturbed, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Done, Warm, differences, numbers

pytestmark = pytest.mark.faults
RANDOM_MOMENTS = 20
PARTS = 8  # every eighth event each, so that something is said before all are tried


class Case:
    """A command that writes below `made`."""

    argv: tuple[str, ...]
    made: str

    def again(self, warm: Warm, cwd: Path) -> Done:
        """As its user goes on after a crash."""
        return warm(*self.argv, cwd=cwd)

    def kept(self, folder: Path) -> dict[str, Any]:
        return numbers(folder)


class Training(Case):
    argv = ("train", "recipe.toml")
    made = "runs/run"

    def again(self, warm: Warm, cwd: Path) -> Done:
        done = warm(*self.argv, "--resume", cwd=cwd)
        if done.status == 2 and "nothing to resume" in done.said:
            return warm(*self.argv, cwd=cwd)
        return done


class Episodes(Training):
    """Several turns in a user's environment, a process of its own; checkpoints are written beside the steps."""

    argv = ("train", "episodes.toml")
    made = "runs/episodes"


class Evaluation(Case):
    argv = ("evaluate", "--model", "MODEL", "--data", "arithmetic:merge-3:test", "--task", "arithmetic", "--limit", "4",
            "-n", "2", "--max-answer-tokens", "8", "--dtype", "float32", "--device", "cpu", "--out", "out")  # fmt: skip
    made = "out"


class Pipelined(Case):
    """A teacher's answers, a student that learns them, and its evaluation: a sampling, a training, a result."""

    argv = ("pipeline", "pipeline.toml")
    made = "runs/pipeline"


CASES = [Training(), Episodes(), Evaluation(), Pipelined()]
TALK = '''
from opdkit.rollouts.environments.base import Step

class Talk:
    """Says a number after every turn, twice."""
    tools = ()
    def reset(self, problem, seed):
        self.turn = 0
        return problem.messages
    def step(self, action, seed):
        self.turn += 1
        said = [{"role": "user", "content": str(seed % 100)}]
        return Step(messages=said, reward=0.5 * (len(action.text) % 2), done=self.turn == 3)
'''
EPISODES = """
name = "episodes"
seed = 3
runs_dir = "runs"
model = {{ path = "{student}", dtype = "float32", device = "cpu" }}
data = {{ train = "arithmetic:merge-3:train", task = "arithmetic", limit = 8 }}
teacher = {{ kind = "model", path = "{teacher}" }}
episode = {{ environment = "talk.py", max_turn_tokens = 6, max_observation_tokens = 6, workers = 1 }}
sampling = {{ max_answer_tokens = 40, group_size = 2 }}
method = {{ name = "opd" }}
train = {{ steps = 2, problems_per_step = 2, lr = 1e-3, save_every = 1, save_in_background = true }}
diagnostics = {{ every = 0 }}
"""
PIPELINE = """
name = "pipeline"
runs_dir = "runs"

[recipe]
seed = 3
model = {{ path = "{model}", dtype = "float32", device = "cpu" }}
data = {{ train = "arithmetic:merge-3:train", task = "arithmetic", limit = 4 }}
sampling = {{ max_answer_tokens = 6, group_size = 1 }}
train = {{ problems_per_step = 2, lr = 1e-3, save_every = 1, schedule = "constant" }}
diagnostics = {{ every = 0 }}

[[stage]]
name = "answers"
kind = "sample"
model = "{model}"
data = "arithmetic:merge-3:train"
task = "arithmetic"
limit = 3
reject = []
max_answer_tokens = 6
dtype = "float32"
device = "cpu"

[[stage]]
name = "sft"
kind = "train"
recipe = {{ data = {{ train = "{answers}" }}, method = {{ name = "sft" }}, train = {{ steps = 1 }} }}

[[stage]]
name = "result"
kind = "evaluate"
model = "{sft}"
data = "arithmetic:merge-3:test"
task = "arithmetic"
limit = 2
n = 1
max_answer_tokens = 6
dtype = "float32"
device = "cpu"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path], models: dict[str, Path]) -> Path:
    """A folder to copy: the inputs of every command."""
    folder = tmp_path_factory.mktemp("world")
    write_recipe(folder)
    (folder / "talk.py").write_text(TALK)
    (folder / "episodes.toml").write_text(EPISODES.format(**models))
    braces = {"answers": "{answers}", "sft": "{sft}"}
    (folder / "pipeline.toml").write_text(PIPELINE.format(model=models["student"], **braces))
    (folder / "MODEL").symlink_to(models["student"])
    return folder


def fresh(world: Path, tmp_path: Path) -> Path:
    """The same path each time: a run keeps the names of its inputs."""
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, symlinks=True)
    return place


def points(events: list[str]) -> list[int]:
    """One-based numbers of the events to die in; of writes into one file in a row, the first and the last."""
    found = []
    for at, event in enumerate(events):
        between = event.startswith("write") and 0 < at < len(events) - 1
        if not (between and events[at - 1] == event == events[at + 1]):
            found.append(at + 1)
    return found


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__)
def test_killed_at_every_event_of_the_file_system(
    case: Case, part: int, warm: Warm, world: Path, tmp_path: Path
) -> None:
    """Before each creation, renaming, removal, sync, and in the middle of writes. What it kills is a real process; what
    the disk would have kept of unsynced writes after a power cut is not tried."""
    place = fresh(world, tmp_path)
    events = warm.events(*case.argv, cwd=place, below=place / case.made)
    whole = case.kept(place / case.made)
    begun, faults, killed = time.monotonic(), [], points(events)[part::PARTS]
    for nth in killed:
        place = fresh(world, tmp_path)
        died = warm(*case.argv, cwd=place, below=str(place / case.made), nth=nth)
        done = case.again(warm, place)
        differ = differences(case.kept(place / case.made), whole) if done.status == 0 else []
        if died.status != -9 or done.status or differ or died.orphans or done.orphans:
            said = "" if done.status == 0 else done.said[-600:]
            faults.append((nth, events[nth - 1], died.status, done.status, said, differ, died.orphans))
    print(f"\n{case.argv[0]}: {len(killed)} of {len(events)} events, {time.monotonic() - begun:.0f} s")
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__)
def test_killed_at_random_moments(case: Case, warm: Warm, world: Path, tmp_path: Path) -> None:
    place = fresh(world, tmp_path)
    began = time.monotonic()
    assert warm(*case.argv, cwd=place).status == 0
    seconds, whole = time.monotonic() - began, case.kept(place / case.made)
    moments = random.Random(0)
    faults, killed = [], 0
    for _ in range(RANDOM_MOMENTS):
        place, moment = fresh(world, tmp_path), moments.uniform(0, seconds)
        died = warm(*case.argv, cwd=place, kill_after=moment)
        killed += died.status == -9
        done = case.again(warm, place) if died.status else died
        differ = differences(case.kept(place / case.made), whole) if done.status == 0 else []
        if done.status or differ or died.orphans:
            said = "" if done.status == 0 else done.said[-600:]
            faults.append((round(moment, 3), died.status, done.status, said, differ, died.orphans))
    assert not faults, "\n".join(map(str, faults))
    assert killed >= RANDOM_MOMENTS // 2, os.times()
