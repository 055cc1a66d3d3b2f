"""Every Example of a step, to and from one Parquet file. A saved run is re-scored from it without a model.

Public schema, version 3 (in the file's metadata as `opdkit_rows_version`), one row per answer. T = answer tokens, S =
terms of the loss. Version 2 lacks `columns` and all that follows it here, version 1 also what begins at `taught_terms`;
both are still read, and so are files of version 3 from before there were episodes, without `turns` and what follows:

    problem_id, task     string              messages      list<map<string, string>>, the chat turns the student read
    gold, solution       string or null      meta          string, a JSON object
    sample_id, policy_version  int64         prompt_ids    list<int32>
    answer_ids           list<int32> [T]     answer_logprobs  list<float> [T] or null: nats, as it was sampled
    answer_mask          list<bool> [T]      finish        "stop" | "length"
    reward               double or null      parsed, feedback  string or null
    view_context_ids     list<int32> or null: what the teacher read; null = no view
    view_sources         list<struct<problem_id, sample_id>> or null         view_num_truncated_tokens  int64 or null
    has_signal           bool: the teacher scored this answer
    sampled_logprob, teacher_entropy  list<float> [T] or null
    topk_ids, topk_logprob  list<int32>, list<float> [T * K] row by row, or null          topk_k  int64 or null: K
    taught_terms         list<string> [S] or null: the loss has not read this answer; then the rest is null too
    taught_coef, taught_loss  list<float> [S * T] term by term; loss NaN where the coefficient is 0
    taught_clipped       list<bool> [T]          student_logprob, student_entropy  list<float> [T], NaN: not computed
    columns              map<string, string>: columns of the data that the recipe names
    view_by              string or null: the view that a [route] had the answer read by; null: none, or no view
    turn                 list<int32> [T] or null: which turn each token belongs to, from 0: one of the model, with what
                         the environment says behind it; null: all of turn 0
    author               list<int32> [T] or null: who wrote each token, 0 student, 1 teacher, 2 data, 3 tool; null: the
                         student, and a tool where the mask is false
    views                list<struct>: what the views besides the teacher's read and said, in the order of their names;
                         each has `name`, and the teacher's columns as context_ids, sources, num_truncated_tokens,
                         has_signal, sampled_logprob, entropy, topk_ids, topk_logprob, topk_k
    turns                list<struct>: of an episode, what became of each turn of the model: finish, num_calls, reward
                         and failure (or null), failures (of the calls that failed), messages (a JSON list: what the
                         environment said, as it was shown), observation_tokens, cut_tokens (left out of them),
                         num_control (control characters in them, and spellings of control tokens), other_stop (the
                         turn ended with a stop token that the template does not write there), info (a JSON object:
                         the environment's own numbers), env_seconds
    ended                string: how the episode ended; "answer" for answers of one turn
    tools                string or null: the tools that the prompt offers, a JSON list of function schemas
    episode, history     int64, string (a JSON list of messages), or null: of an episode that takes several rows, which
                         of its problem's episodes this is a part of, and what was said between the prompt and its turns

The log-probs of tokens that the model did not write (`author`) are NaN.

What was taught costs about 10 bytes a token (4 more for each further term), the rest about 8.

Null is "unknown" or "not there", never 0. Everything comes back equal, bit for bit, but what only the step itself reads
and is not saved: a teacher's hidden states (as large as all the rest a hundred times over), the sampler's log-probs
before a cut (`rollout/sampler_gap_...`), and what a view showed (`context/...`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opdkit.errors import UserError
from opdkit.run.folder import atomic_path
from opdkit.run.row_columns import (
    COLUMNS,
    FLAGS,
    FLOAT32S,
    FLOATS,
    IDS,
    INT32S,
    READABLE,
    SCHEMA,
    VERSION,
    VERSION_KEY,
    VIEW,
    Ids,
    flat,
    is_of,
)
from opdkit.run.sums import is_changed
from opdkit.types import Example, Problem, Rollout, Signal, Taught, TurnRecord, View


def _leaf(field: pa.Field) -> str:
    return f"{field.name}.list.element" if pa.types.is_large_list(field.type) else field.name


_MOST_VALUES = 1 << 28  # of a row group that is read
_TOKENS_PER_GROUP = 4_000_000  # tokens and top-k entries of one row group: what is in memory beside the rows
# Dictionaries pay for texts and token ids, and cost half of the time for log-probs and top-k ids, where they never fit.
# Floats split into byte planes compress a tenth better.
_NO_DICTIONARY = {name for name, (type_, _) in COLUMNS.items() if type_ == FLOATS} | {"topk_ids"}
_WRITER_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "write_page_checksum": True,
    "use_dictionary": [_leaf(field) for field in SCHEMA if field.name not in _NO_DICTIONARY],
    "column_encoding": {_leaf(field): "BYTE_STREAM_SPLIT" for field in SCHEMA if field.type == FLOATS},
}


def save_rows(path: Path, examples: Sequence[Example]) -> None:
    """Write the rows, whole or not at all. The folder exists.

    Raises UserError when the disk is full; ValueError for what would not come back equal (a log-prob array that is not
    float32, meta that is not plain JSON, text that is not valid Unicode).
    """
    with atomic_path(path) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, **_WRITER_OPTIONS) as writer:
        for group in _row_groups(examples):
            arrays = [_column(name, [get(row) for row in group]) for name, (_, get) in COLUMNS.items()]
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))


def load_rows(path: Path) -> list[Example]:
    """The rows in the order they were saved. Problems that several rows share are one object.

    Raises UserError for a file that is missing, cut short, not of rows, or of a newer version than this opdkit reads.
    """
    examples: list[Example] = []
    problems: dict[str, Problem] = {}
    if is_changed(path):
        raise UserError(f"{path} is not what the run wrote (its checksum is another one): restore it from a copy")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow)
            for index in range(file.num_row_groups):
                _check_size(path, file.metadata.row_group(index))
                examples += _examples(file.read_row_group(index), problems)
    except FileNotFoundError:
        raise UserError(f"there are no rows at {path}: the file does not exist") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a complete Parquet file ({words}): it was cut short or changed") from None
    return examples


def _check_size(path: Path, group: Any) -> None:
    """A few kilobytes may say that they hold billions of equal values."""
    values = sum(group.column(index).num_values for index in range(group.num_columns))
    if values > _MOST_VALUES:
        raise UserError(f"{path} holds {values:,} values in one row group, and rows have at most {_MOST_VALUES:,}")


def column_values(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The columns by name, for data frames: turns and meta as dicts, arrays in their shapes, [T], [T, K], [S, T]."""
    found = {name: [get(row) for row in examples] for name, (_, get) in COLUMNS.items()}
    problems = [row.problem for row in examples]
    turns = [[dict(turn) for turn in problem.messages] for problem in problems]
    return {**found, "messages": turns, "meta": [dict(problem.meta) for problem in problems]}


def _row_groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    size = 0
    for example in examples:
        group.append(example)
        size += len(example.rollout.prompt_ids) + len(example.rollout.answer_ids)
        size += sum(len(view.context_ids) for view in example.views.values())
        size += sum(s.topk_ids_TK.size for s in example.signals.values() if s.topk_ids_TK is not None)
        size += example.taught.coef_ST.size if example.taught else 0
        if size >= _TOKENS_PER_GROUP:
            yield group
            group, size = [], 0
    if group or not examples:  # an empty step is a file without rows, not a missing file
        yield group


def _column(name: str, values: list[Any]) -> pa.Array:
    type_ = SCHEMA.field(name).type
    try:
        if type_ in (IDS, FLOATS, FLAGS):
            return _list_column(values, type_)
        return pa.array(values, type_)
    except (UnicodeEncodeError, pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise ValueError(f"rows cannot be saved: column {name}: {error}") from error


def _list_column(values: list[Ids | None], type_: pa.DataType) -> pa.Array:
    """list<number> out of tuples and arrays, without a Python object per number."""
    parts = [None if value is None else flat(value, type_) for value in values]
    lengths = np.array([0 if part is None else len(part) for part in parts], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    known = [part for part in parts if part is not None]
    numbers = np.concatenate(known) if known else np.zeros(0, dtype=type_.value_type.to_pandas_dtype())
    missing = pa.array([part is None for part in parts], pa.bool_())
    return pa.LargeListArray.from_arrays(offsets, pa.array(numbers, type_.value_type), mask=missing)


def _check_schema(path: Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        raise UserError(f"{path} holds no opdkit rows; rows are in the rows/ folder of a run")
    if version not in READABLE:
        found = version.decode(errors="replace")
        raise UserError(f"{path} is of rows version {found} and this opdkit reads up to {VERSION}: update opdkit")
    if not is_of(schema, version):
        raise UserError(
            f"{path} has other columns than opdkit rows of version {version.decode()}: another tool has changed it"
        )


def _examples(table: pa.Table, problems: dict[str, Problem]) -> Iterable[Example]:
    columns = {name: _python_column(table.column(name).combine_chunks()) for name in table.column_names}
    for index in range(table.num_rows):
        row = {name: values[index] for name, values in columns.items()}
        problem = _problem(row)
        if problems.setdefault(problem.id, problem) == problem:
            problem = problems[problem.id]
        views, signals = _views(row)
        yield Example(problem=problem, rollout=_rollout(row), views=views, signals=signals, taught=_taught(row))


def _python_column(array: pa.Array) -> list[Any]:
    """One entry per row: arrays for lists of numbers (copies, so that one row does not keep the file in memory)."""
    if array.type == SCHEMA.field("views").type:
        return _spans(array, _structs(array.values))
    if array.type not in (IDS, FLOATS, FLAGS, INT32S, FLOAT32S):
        return list(array.to_pylist())
    numbers = array.values.to_numpy(zero_copy_only=False)
    return [None if span is None else span.copy() for span in _spans(array, numbers)]


def _structs(array: pa.StructArray) -> list[dict[str, Any]]:
    fields = [_python_column(array.field(index)) for index in range(array.type.num_fields)]
    return [dict(zip(VIEW.names, entries, strict=True)) for entries in zip(*fields, strict=True)]


def _spans(array: pa.ListArray | pa.LargeListArray, entries: Any) -> list[Any]:
    """What of the entries of all rows belongs to each; None where the list is missing."""
    offsets, missing = array.offsets.to_numpy().tolist(), array.is_null().to_pylist()
    spans = zip(offsets[:-1], offsets[1:], missing, strict=True)
    return [None if is_missing else entries[start:end] for start, end, is_missing in spans]


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(
        id=row["problem_id"],
        task=row["task"],
        messages=tuple(dict(turn) for turn in row["messages"]),
        gold=row["gold"],
        solution=row["solution"],
        columns=dict(row.get("columns") or ()),
        tools=tuple(json.loads(row.get("tools") or "[]")),
        meta=json.loads(row["meta"]),
    )


def _rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(
        problem_id=row["problem_id"],
        sample_id=row["sample_id"],
        policy_version=row["policy_version"],
        prompt_ids=tuple(row["prompt_ids"].tolist()),
        answer_ids=tuple(row["answer_ids"].tolist()),
        answer_logprobs=row["answer_logprobs"],
        answer_mask=row["answer_mask"],
        finish=row["finish"],
        reward=row["reward"],
        parsed=row["parsed"],
        feedback=row["feedback"],
        turn=None if row.get("turn") is None else row["turn"].astype(np.int16),
        author=None if row.get("author") is None else row["author"].astype(np.uint8),
        turns=tuple(_turn(turn) for turn in row.get("turns") or ()),
        ended=row.get("ended") or "answer",
        episode=row.get("episode"),
        history=tuple(json.loads(row.get("history") or "[]")),
    )


def _turn(columns: dict[str, Any]) -> TurnRecord:
    texts = {"messages": tuple(json.loads(columns["messages"])), "info": json.loads(columns["info"])}
    return TurnRecord(**{**columns, **texts, "failures": tuple(columns["failures"])})


def _views(row: dict[str, Any]) -> tuple[dict[str, View], dict[str, Signal]]:
    """What the views read and what they said, by name."""
    found = [("teacher", {**row, **_as_other(row)}), *((view["name"], view) for view in row.get("views") or ())]
    num_tokens = len(row["answer_ids"])
    views = {name: _view(columns) for name, columns in found if columns["context_ids"] is not None}
    return views, {name: _signal(columns, num_tokens) for name, columns in found if columns["has_signal"]}


def _as_other(row: dict[str, Any]) -> dict[str, Any]:
    """The teacher's columns under the names that the other views' have."""
    names = ("by", "context_ids", "sources", "num_truncated_tokens")
    return {**{name: row.get(f"view_{name}") for name in names}, "entropy": row["teacher_entropy"]}


def _view(columns: dict[str, Any]) -> View:
    return View(
        context_ids=tuple(np.asarray(columns["context_ids"], dtype=np.int64).tolist()),
        by=columns.get("by"),
        sources=tuple((peer["problem_id"], peer["sample_id"]) for peer in columns["sources"]),
        num_truncated_tokens=columns["num_truncated_tokens"],
    )


def _signal(columns: dict[str, Any], num_tokens: int) -> Signal:
    shape = (num_tokens, columns["topk_k"])

    def array(name: str, dtype: Any) -> Any:
        return None if columns[name] is None else np.asarray(columns[name], dtype=dtype)

    ids, logprobs = array("topk_ids", np.int64), array("topk_logprob", np.float32)
    return Signal(
        sampled_logprob_T=array("sampled_logprob", np.float32),
        entropy_T=array("entropy", np.float32),
        topk_ids_TK=None if ids is None else ids.reshape(shape),
        topk_logprob_TK=None if logprobs is None else logprobs.reshape(shape),
    )


def _taught(row: dict[str, Any]) -> Taught | None:
    if row.get("taught_terms") is None:  # version 1 has no such column
        return None
    shape = (len(row["taught_terms"]), len(row["answer_ids"]))
    return Taught(
        terms=tuple(row["taught_terms"]),
        coef_ST=row["taught_coef"].reshape(shape),
        loss_ST=row["taught_loss"].reshape(shape),
        clipped_T=row["taught_clipped"],
        student_logprob_T=row["student_logprob"],
        student_entropy_T=row["student_entropy"],
    )
