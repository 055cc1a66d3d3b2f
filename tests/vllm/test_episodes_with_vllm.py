"""Episodes that a real vLLM process on this CPU plays: `make test-vllm`, outside `make test`. A tiny model that was
taught calls of the calculator for a minute, in float32."""

from __future__ import annotations

import json
import os
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from opdkit.engines.scratch import tool_tokenizer
from opdkit.engines.servers.http import KEY_VARIABLE
from opdkit.engines.servers.process import VllmOptions, VllmProcess
from opdkit.recipe import Recipe, parse_recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train
from opdkit.training.make_model import BATCH, make_model
from opdkit.training.problems.tool_lessons import ARGUMENT, TOOL, tool_lessons
from opdkit.types import Example, Rollout

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("OPDKIT_VLLM_PYTHON", str(Path(__file__).parents[2] / ".venv-vllm/bin/python"))
DATA, LESSONS = "arithmetic:multiply-2:train", 80 * BATCH
# vLLM, where texts end answers, renders a message of its own as it starts, which takes letters.
TOKENIZER = tool_tokenizer(string.printable, tools=[TOOL], arguments=[ARGUMENT])
GAP = 1e-3  # nats, as where answers have one turn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 numbers, the least that vLLM's CPU attention takes. Its calls can be read, and its products are
    often wrong."""
    folder = tmp_path_factory.mktemp("agent") / "student"
    make_model(
        folder,
        data=DATA,
        hidden_size=128,
        num_layers=1,
        steps=LESSONS // BATCH,
        seed=0,
        console=Console(quiet=True),
        problems=tool_lessons(DATA, num=LESSONS, seed=0),
        tokenizer=TOKENIZER,
        max_positions=192,
    )
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    options = VllmOptions(model=str(model), dtype="float32", python=PYTHON, max_model_len=192, reads_text=True)
    process = VllmProcess(options, log=folder / "vllm.log", folder=folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
        started = time.monotonic()
        key = process.start(lambda seconds: None)._token
        print(f"\nvLLM {process.found.version} answered after {time.monotonic() - started:.0f} s")
        patch.setenv(KEY_VARIABLE, key or "")
        assert process.url is not None
        yield process.url
    process.stop()


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        raw = {
            "name": "run",
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
            "teacher": {"kind": "model", "path": str(model)},
            "data": {"train": DATA, "task": "arithmetic", "limit": 64},
            "episode": {"environment": "calculator", "max_turns": 3, "max_observation_tokens": 16},
            "sampling": {"max_answer_tokens": 16, "group_size": 2},
            "method": {"name": "opd"},
            "train": {"steps": 2, "problems_per_step": 8, "lr": 1e-3, "save_every": 0, "save_rows_every": 1},
        }
        return parse_recipe(raw, list(overrides))

    return make


def rows_of(run: Recipe) -> list[Example]:
    return [row for step in (1, 2) for row in load_rows(run.run_dir / "rows" / f"step_{step:06d}.parquet")]


def lines(run: Recipe) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "train/loss" in line]


def heard_behind(rollouts: list[Rollout]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """How a turn ended, and what it was answered -> the ids that stand for that in the row."""
    found = {}
    for one in rollouts:
        for number, turn in enumerate(one.turns):
            ids = np.array(one.answer_ids)[(one.turn_numbers == number) & ~one.answer_mask]
            if turn.observation_tokens:
                said = (turn.finish, *(str(message["content"]) for message in turn.messages))
                found[said] = tuple(ids.tolist())
    return found


def test_rows_are_those_of_the_engine_here(recipe: Callable[..., Recipe], url: str, console: Console) -> None:
    """Calls are made and answered between two calls of the engine; every token of the model is scored as it was
    sampled, before and after an update; the rows differ in what was drawn alone."""
    there = recipe("sampling.engine=server", f"sampling.url={url}", "name=there")
    here = recipe("name=here")
    for run in (there, here):
        train(run, console=console)
    gaps = [line["rollout/max_logprob_gap"] for line in lines(there)]
    ended = Counter(row.rollout.ended for row in rows_of(there))
    print(f"\nlargest gap of a model token: {gaps}; ended {dict(ended)}; {lines(there)[0]['rollout/calls']:.2f} calls")
    assert max(gaps) < GAP and all(line["rollout/calls"] > 0.5 for line in lines(there))
    assert ended["answer"] and any(len(row.rollout.turns) > 1 for row in rows_of(there))
    both = [[row.rollout for row in rows_of(run)] for run in (there, here)]
    asked = [[(one.problem_id, one.sample_id, one.prompt_ids) for one in side] for side in both]
    assert asked[0] == asked[1]
    for one in both[0]:
        assert (np.isnan(one.answer_logprobs) == ~one.answer_mask).all()
        assert len(one.turn_numbers) == len(one.answer_ids)
        assert len(one.turns) == one.turn_numbers.max() + 1
    said, known = heard_behind(both[0]), heard_behind(both[1])
    assert said.keys() & known.keys() and all(said[key] == known[key] for key in said.keys() & known.keys())
    files = [pq.read_schema(run.run_dir / "rows" / "step_000001.parquet") for run in (there, here)]
    assert files[0].equals(files[1])


def test_a_text_ends_a_turn(recipe: Callable[..., Recipe], url: str, console: Console) -> None:
    """With the token that completes it: nothing of the model stands behind the text."""
    run = recipe("sampling.engine=server", f"sampling.url={url}", 'episode.stop=["7"]')
    train(run, console=console)
    ends = Counter[bool]()
    for row in rows_of(run):
        one = row.rollout
        for number, turn in enumerate(one.turns):
            ids = np.array(one.answer_ids)[(one.turn_numbers == number) & one.answer_mask].tolist()
            text = TOKENIZER.decode(ids)
            assert "7" not in text[:-1]
            ends[text.endswith("7")] += 1
            assert not text.endswith("7") or turn.finish == "stop"
    print(f"\nturns that the text ended: {ends[True]} of {ends.total()}")
    assert ends[True] and ends[False]
    assert max(line["rollout/max_logprob_gap"] for line in lines(run)) < GAP
