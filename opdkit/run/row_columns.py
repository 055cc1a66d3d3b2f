"""The columns of saved rows: what each is called, of which type, and how it comes out of an Example.

`opdkit/run/rows.py` says what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opdkit.types import Example, Problem, Signal, TurnRecord

VERSION = 3
VERSION_KEY = b"opdkit_rows_version"
IDS, FLOATS, FLAGS = pa.large_list(pa.int32()), pa.large_list(pa.float32()), pa.large_list(pa.bool_())
_SOURCE = pa.struct([("problem_id", pa.string()), ("sample_id", pa.int64())])
_MESSAGE = pa.map_(pa.string(), pa.string())
INT32S, FLOAT32S = pa.list_(pa.int32()), pa.list_(pa.float32())
VIEW = pa.struct(
    [
        ("name", pa.string()),
        ("context_ids", INT32S),
        ("sources", pa.list_(_SOURCE)),
        ("num_truncated_tokens", pa.int64()),
        ("has_signal", pa.bool_()),
        ("sampled_logprob", FLOAT32S),
        ("entropy", FLOAT32S),
        ("topk_ids", INT32S),
        ("topk_logprob", FLOAT32S),
        ("topk_k", pa.int64()),
    ]
)

TURN = pa.struct(
    [
        ("finish", pa.string()),
        ("num_calls", pa.int64()),
        ("reward", pa.float64()),
        ("failure", pa.string()),
        ("failures", pa.list_(pa.string())),
        ("messages", pa.string()),
        ("observation_tokens", pa.int64()),
        ("cut_tokens", pa.int64()),
        ("num_control", pa.int64()),
        ("other_stop", pa.bool_()),
        ("info", pa.string()),
        ("env_seconds", pa.float64()),
    ]
)

Ids = Sequence[int] | npt.NDArray[Any]

# Column -> (type, how to get it from an Example). Arrays are flattened; the order here is the order in the file.
COLUMNS: dict[str, tuple[pa.DataType, Callable[[Example], Any]]] = {
    "problem_id": (pa.string(), lambda row: _shared_id(row)),
    "task": (pa.string(), lambda row: row.problem.task),
    "messages": (pa.list_(_MESSAGE), lambda row: [list(turn.items()) for turn in row.problem.messages]),
    "gold": (pa.string(), lambda row: row.problem.gold),
    "solution": (pa.string(), lambda row: row.problem.solution),
    "meta": (pa.string(), lambda row: _meta_text(row.problem)),
    "sample_id": (pa.int64(), lambda row: row.rollout.sample_id),
    "policy_version": (pa.int64(), lambda row: row.rollout.policy_version),
    "prompt_ids": (IDS, lambda row: row.rollout.prompt_ids),
    "answer_ids": (IDS, lambda row: row.rollout.answer_ids),
    "answer_logprobs": (FLOATS, lambda row: row.rollout.answer_logprobs),
    "answer_mask": (FLAGS, lambda row: row.rollout.answer_mask),
    "finish": (pa.string(), lambda row: row.rollout.finish),
    "reward": (pa.float64(), lambda row: row.rollout.reward),
    "parsed": (pa.string(), lambda row: row.rollout.parsed),
    "feedback": (pa.string(), lambda row: row.rollout.feedback),
    "view_context_ids": (IDS, lambda row: row.view and row.view.context_ids),
    "view_sources": (pa.list_(_SOURCE), lambda row: row.view and [_source(*peer) for peer in row.view.sources]),
    "view_num_truncated_tokens": (pa.int64(), lambda row: row.view and row.view.num_truncated_tokens),
    "has_signal": (pa.bool_(), lambda row: row.signal is not None),
    "sampled_logprob": (FLOATS, lambda row: row.signal and row.signal.sampled_logprob_T),
    "teacher_entropy": (FLOATS, lambda row: row.signal and row.signal.entropy_T),
    "topk_ids": (IDS, lambda row: row.signal and row.signal.topk_ids_TK),
    "topk_logprob": (FLOATS, lambda row: row.signal and row.signal.topk_logprob_TK),
    "topk_k": (pa.int64(), lambda row: row.signal and _width(row.signal)),
    "taught_terms": (pa.list_(pa.string()), lambda row: row.taught and list(row.taught.terms)),
    "taught_coef": (FLOATS, lambda row: row.taught and row.taught.coef_ST),
    "taught_loss": (FLOATS, lambda row: row.taught and row.taught.loss_ST),
    "taught_clipped": (FLAGS, lambda row: row.taught and row.taught.clipped_T),
    "student_logprob": (FLOATS, lambda row: row.taught and row.taught.student_logprob_T),
    "student_entropy": (FLOATS, lambda row: row.taught and row.taught.student_entropy_T),
    "columns": (_MESSAGE, lambda row: list(row.problem.columns.items())),
    "view_by": (pa.string(), lambda row: row.view and row.view.by),
    "turn": (IDS, lambda row: row.rollout.turn),
    "author": (IDS, lambda row: row.rollout.author),
    "views": (pa.list_(VIEW), lambda row: [_other_view(row, name) for name in _other_views(row)]),
    "turns": (pa.list_(TURN), lambda row: [_turn(turn) for turn in row.rollout.turns]),
    "ended": (pa.string(), lambda row: row.rollout.ended),
    "tools": (pa.string(), lambda row: _json(row.problem.tools) if row.problem.tools else None),
    "episode": (pa.int64(), lambda row: row.rollout.episode),
    "history": (pa.string(), lambda row: _json(row.rollout.history) if row.rollout.history else None),
}
OF_EPISODES = ("turns", "ended", "tools", "episode", "history")  # the first files of version 3 lack them
_SINCE_3 = ("columns", "view_by", "turn", "author", "views", *OF_EPISODES)
_SINCE_2 = ("taught_terms", "taught_coef", "taught_loss", "taught_clipped", "student_logprob", "student_entropy")


def _schema(version: int, without: Sequence[str] = ()) -> pa.Schema:
    fields = [(name, type_) for name, (type_, _) in COLUMNS.items() if name not in without]
    return pa.schema(fields, {VERSION_KEY: str(version).encode()})


SCHEMA = _schema(VERSION)
# What a file of each version holds at least.
READABLE = {
    b"1": _schema(1, without=_SINCE_2 + _SINCE_3),
    b"2": _schema(2, without=_SINCE_3),
    b"3": _schema(3, without=OF_EPISODES),
}


def is_of(schema: pa.Schema, version: bytes) -> bool:
    """Whether a file's columns are those of that version; it may have some that later ones added."""
    found, least = ({field.name: field.type for field in one} for one in (schema, READABLE[version]))
    known = {field.name: field.type for field in SCHEMA}
    return least.items() <= found.items() and found.items() <= known.items()


def flat(value: Ids, type_: pa.DataType) -> npt.NDArray[Any]:
    """One dimension, in the column's type. Raises ValueError for what would come back changed."""
    array = np.asarray(value).reshape(-1) if len(value) else np.zeros(0, dtype=type_.value_type.to_pandas_dtype())
    if type_ == IDS:
        narrow = array.astype(np.int32)
        if array.dtype.kind not in "iu" or not np.array_equal(narrow, array):
            raise ValueError(f"token ids are {array.dtype}, or too large for 32 bits")
        return narrow
    expected = np.dtype(type_.value_type.to_pandas_dtype())
    if array.dtype != expected:
        raise ValueError(f"an array is {array.dtype}, not {expected}; it would come back changed")
    return array


def _shared_id(row: Example) -> str:
    if row.problem.id != row.rollout.problem_id:
        raise ValueError(f"the answer to {row.rollout.problem_id!r} stands beside the problem {row.problem.id!r}")
    return row.problem.id


def _source(problem_id: str, sample_id: int) -> dict[str, Any]:
    return {"problem_id": problem_id, "sample_id": sample_id}


def _other_views(row: Example) -> list[str]:
    return sorted((row.views.keys() | row.signals.keys()) - {"teacher"})


def _other_view(row: Example, name: str) -> dict[str, Any]:
    view, signal = row.views.get(name), row.signals.get(name)
    said = signal or Signal()

    def maybe(value: Ids | None, type_: pa.DataType) -> npt.NDArray[Any] | None:
        return None if value is None else flat(value, type_)

    return {
        "name": name,
        "context_ids": view and flat(view.context_ids, IDS),
        "sources": view and [_source(*peer) for peer in view.sources],
        "num_truncated_tokens": view and view.num_truncated_tokens,
        "has_signal": signal is not None,
        "sampled_logprob": maybe(said.sampled_logprob_T, FLOATS),
        "entropy": maybe(said.entropy_T, FLOATS),
        "topk_ids": maybe(said.topk_ids_TK, IDS),
        "topk_logprob": maybe(said.topk_logprob_TK, FLOATS),
        "topk_k": _width(said),
    }


def _turn(turn: TurnRecord) -> dict[str, Any]:
    told = {name: getattr(turn, name) for name in TURN.names}
    return {**told, "messages": _json(turn.messages), "info": json.dumps(dict(turn.info))}


def _json(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([dict(one) for one in messages])


def _width(signal: Signal) -> int | None:
    return None if signal.topk_ids_TK is None else signal.topk_ids_TK.shape[1]


def _meta_text(problem: Problem) -> str:
    meta = dict(problem.meta)
    text = json.dumps(meta)
    if json.loads(text) != meta:
        raise ValueError(f"rows cannot be saved: meta of problem {problem.id!r} is not plain JSON: {meta}")
    return text
