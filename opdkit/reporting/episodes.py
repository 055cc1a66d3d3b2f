"""`opdkit episodes`: episodes of a run in the terminal, turn by turn, out of its saved rows. No model, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.errors import UserError
from opdkit.reporting.decode import tokenizer_decode
from opdkit.reporting.figures.tokens import Decode
from opdkit.reporting.run import read_progress
from opdkit.run.console import Line, Table
from opdkit.run.folder import RunFolder
from opdkit.run.rows import load_rows
from opdkit.types import AUTHORS, Example, Rollout

_TOOL = AUTHORS.index("tool")


def read_episodes(
    folder: Path, *, step: int | None = None, problem: str | None = None, sample: int | None = None, count: int = 1
) -> tuple[int, list[list[Example]]]:
    """(the step, its episodes, each as its rows). step None: the last that was saved.

    Raises UserError where no rows were saved, and where none is of that problem and sample.
    """
    files = RunFolder(folder)
    steps = files.row_steps()
    if not steps:
        raise UserError(f"{folder} saved no rows; set train.save_rows_every in its recipe")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise UserError(f"{folder} saved no rows of step {chosen}; it has those of {steps[0]} to {steps[-1]}")
    found: dict[tuple[str, int], list[Example]] = {}
    for row in load_rows(files.rows(chosen)):
        found.setdefault((row.rollout.problem_id, row.rollout.episode_id), []).append(row)
    wanted = [
        rows
        for (problem_id, episode), rows in found.items()
        if problem in (None, problem_id) and sample in (None, episode)
    ]
    if not wanted:
        some = ", ".join(dict.fromkeys(name for name, _ in found)) or "none"
        raise UserError(
            f"step {chosen} of {folder} has no answer of that problem and sample; its problems are {some[:300]}"
        )
    return chosen, wanted[:count]


def decode_of(folder: Path) -> Decode | None:
    """Of the run's tokenizer; None: it is not on this machine."""
    return tokenizer_decode(read_progress(folder, []))


def shown(step: int, rows: Sequence[Example], decode: Decode | None) -> list[Line | Table]:
    """One episode."""
    first, last = rows[0], rows[-1].rollout
    own = sum(int((row.rollout.authors != _TOOL).sum()) for row in rows)
    whole = sum(len(row.rollout.answer_ids) for row in rows)
    reward = "no reward" if last.reward is None else f"reward {last.reward:g}"
    turns = sum(len(_turns(row.rollout)) for row in rows)
    head = f"step {step}, {last.problem_id}, sample {last.episode_id}: {reward}, ended: {last.ended}"
    lengths = f"{turns} turns, {whole} tokens, {own} of them the model's"
    table = Table("who", "what", "tokens", is_plain=True)
    for message in first.problem.messages:
        table.add_row(str(message["role"]), str(message["content"]), "")
    for part in rows:
        if part is not first:
            table.add_row("", "(shown anew, as the chat template has it)", "")
        for who, what, number in _parts(part.rollout, decode):
            table.add_row(who, what, number)
    lines: list[Line | Table] = [Line((head, "bold")), Line(lengths), table]
    return [*lines, Line(f"feedback: {last.feedback}")] if last.feedback else lines


def as_json(step: int, rows: Sequence[Example], decode: Decode | None) -> dict[str, Any]:
    last = rows[-1].rollout
    return {
        "step": step,
        "problem": last.problem_id,
        "sample": last.episode_id,
        "reward": last.reward,
        "ended": last.ended,
        "feedback": last.feedback,
        "messages": [dict(message) for message in rows[0].problem.messages],
        "turns": [turn for row in rows for turn in _json_turns(row.rollout, decode)],
    }


def _turns(rollout: Rollout) -> list[int]:
    """The numbers of the model's turns."""
    return [int(number) for number in np.unique(rollout.turn_numbers)]


def _text(rollout: Rollout, number: int, decode: Decode | None) -> tuple[str, int]:
    """(what the model wrote in a turn, its tokens)"""
    own_T = (rollout.turn_numbers == number) & (rollout.authors != _TOOL)
    ids = np.asarray(rollout.answer_ids, dtype=np.int64)[own_T].tolist()
    return ("" if decode is None else decode(ids)), len(ids)


def _parts(rollout: Rollout, decode: Decode | None) -> Iterator[tuple[str, str, str]]:
    for place, number in enumerate(_turns(rollout)):
        text, num_tokens = _text(rollout, number, decode)
        yield f"turn {number}", text if decode else "(its tokenizer is not here)", str(num_tokens)
        record = rollout.turns[place] if place < len(rollout.turns) else None
        if record is None:
            continue
        notes = [f"{record.num_calls} calls"] if record.num_calls else []
        notes += [] if record.finish == "stop" else ["cut"]
        notes += [] if record.reward is None else [f"reward {record.reward:g}"]
        notes += [record.failure] if record.failure else []
        notes += [f"{record.cut_tokens} tokens of the results left out"] if record.cut_tokens else []
        if notes:
            yield "", f"({', '.join(notes)})", ""
        for message in record.messages:
            who = f"tool {message['name']}" if message["role"] == "tool" else str(message["role"])
            yield who, str(message["content"]), str(record.observation_tokens) if message is record.messages[0] else ""


def _json_turns(rollout: Rollout, decode: Decode | None) -> Iterator[dict[str, Any]]:
    for place, number in enumerate(_turns(rollout)):
        text, num_tokens = _text(rollout, number, decode)
        record = rollout.turns[place] if place < len(rollout.turns) else None
        told = (
            {}
            if record is None
            else {
                "finish": record.finish,
                "num_calls": record.num_calls,
                "reward": record.reward,
                "failure": record.failure,
                "messages": [dict(message) for message in record.messages],
                "observation_tokens": record.observation_tokens,
                "cut_tokens": record.cut_tokens,
            }
        )
        yield {"turn": number, "text": text if decode else None, "tokens": num_tokens, **told}
