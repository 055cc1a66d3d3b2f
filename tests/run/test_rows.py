"""Rows come back from Parquet as they were, and broken files are refused."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkit.errors import UserError
from opdkit.run import rows
from opdkit.run.rows import load_rows, save_rows
from opdkit.types import AUTHORS, Ended, Example, Problem, Rollout, Signal, Taught, TurnRecord, View

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
view_names = st.lists(st.sampled_from(["teacher", "reference", "hint.0", "hint.1"]), unique=True)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def example_rows(draw: st.DrawFn) -> Example:
    def floats(*shape: int) -> Any:
        """Any bits: infinities, NaNs and negative zeros too."""
        bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        return np.array(bits, dtype=np.uint32).view(np.float32).reshape(shape)

    def maybe(value: Any) -> Any:
        return draw(st.sampled_from([None, value]))

    answer_ids = draw(ids)
    num_tokens, k = len(answer_ids), draw(st.integers(0, 3))
    problem = Problem(
        id=draw(text),
        task=draw(text),
        messages=tuple(draw(st.lists(st.dictionaries(text, text, max_size=3), max_size=2))),
        gold=maybe(draw(text)),
        solution=maybe(draw(text)),
        tools=tuple(draw(st.lists(st.dictionaries(text, json_values, max_size=2), max_size=2))),
        meta=draw(st.dictionaries(text, json_values, max_size=2)),
    )
    turn = TurnRecord(
        finish="length",
        num_calls=draw(st.integers(0, 9)),
        reward=maybe(draw(st.floats(allow_nan=False))),
        failure=maybe("tool_error"),
        failures=tuple(draw(st.lists(st.just("timeout"), max_size=2))),
        other_stop=draw(st.booleans()),
        info=draw(st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=2)),
        messages=tuple(draw(st.lists(st.dictionaries(text, text, max_size=2), max_size=2))),
        observation_tokens=draw(st.integers(0, 9)),
        env_seconds=draw(st.floats(0, 9)),
    )
    rollout = Rollout(
        problem_id=problem.id,
        sample_id=draw(st.integers(0, 2**40)),
        policy_version=draw(st.integers(0, 2**40)),
        prompt_ids=draw(ids),
        answer_ids=answer_ids,
        answer_logprobs=maybe(floats(num_tokens)),
        answer_mask=np.array([draw(st.booleans()) for _ in range(num_tokens)], dtype=np.bool_),
        finish=draw(st.sampled_from(["stop", "length"])),
        reward=maybe(draw(st.floats(allow_nan=False))),
        parsed=maybe(draw(text)),
        feedback=maybe(draw(text)),
        turn=maybe(np.array([draw(st.integers(0, 999)) for _ in range(num_tokens)], dtype=np.int16)),
        author=maybe(np.array([draw(st.integers(0, len(AUTHORS) - 1)) for _ in range(num_tokens)], dtype=np.uint8)),
        turns=tuple(draw(st.lists(st.just(turn), max_size=2))),
        ended=draw(st.sampled_from(get_args(Ended))),
        episode=maybe(3),
        history=tuple(draw(st.lists(st.dictionaries(text, text, max_size=2), max_size=2))),
    )

    def view() -> View:
        sources = tuple(draw(st.lists(st.tuples(text, st.integers(0, 99)), max_size=2)))
        return View(context_ids=draw(ids), sources=sources, num_truncated_tokens=draw(st.integers(0, 99)))

    def signal() -> Signal:
        has_topk = draw(st.booleans())
        return Signal(
            sampled_logprob_T=maybe(floats(num_tokens)),
            entropy_T=maybe(floats(num_tokens)),
            topk_ids_TK=np.arange(num_tokens * k, dtype=np.int64).reshape(num_tokens, k) if has_topk else None,
            topk_logprob_TK=floats(num_tokens, k) if has_topk else None,
        )

    views = {name: view() for name in draw(view_names)}
    signals = {name: signal() for name in draw(view_names)}
    names = tuple(draw(st.lists(text, max_size=2)))
    taught = Taught(
        terms=names,
        coef_ST=floats(len(names), num_tokens),
        loss_ST=floats(len(names), num_tokens),
        clipped_T=np.array([draw(st.booleans()) for _ in range(num_tokens)], dtype=np.bool_),
        student_logprob_T=floats(num_tokens),
        student_entropy_T=floats(num_tokens),
    )
    return Example(problem=problem, rollout=rollout, views=views, signals=signals, taught=maybe(taught))


def plain(value: Any) -> Any:
    """Comparable with ==, bit for bit: arrays as (dtype, shape, bytes)."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


FLOAT64 = Signal(sampled_logprob_T=np.zeros(3))  # type: ignore[arg-type]


def simple(problem_id: str = "p", sample_id: int = 0, num_tokens: int = 3, **rest: Any) -> Example:
    answer_ids = tuple(range(num_tokens))
    return Example(
        problem=Problem(id=problem_id, task="math", messages=({"role": "user", "content": "1+1?"},), gold="2"),
        rollout=Rollout(
            problem_id=problem_id,
            sample_id=sample_id,
            policy_version=1,
            prompt_ids=(7, 8),
            answer_ids=answer_ids,
            answer_logprobs=np.zeros(num_tokens, dtype=np.float32),
            answer_mask=np.ones(num_tokens, dtype=np.bool_),
            finish="stop",
        ),
        **rest,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(example_rows(), max_size=4), st.sampled_from([1, 10, 10**6]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, examples: list[Example], tokens_per_group: int) -> None:
    """Every field of every row comes back, floats bit for bit, None apart from empty, for any size of row groups."""
    path = tmp_path_factory.mktemp("rows") / "step.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_TOKENS_PER_GROUP", tokens_per_group)
        save_rows(path, examples)
    assert [plain(row) for row in load_rows(path)] == [plain(row) for row in examples]


def test_types_come_back(tmp_path: Path) -> None:
    """What is equal is also of the same type: tuples, dicts, Python numbers, writable arrays of their own."""
    save_rows(tmp_path / "r.parquet", [simple(views={"teacher": View(context_ids=(1,), sources=(("p", 1),))})])
    row = load_rows(tmp_path / "r.parquet")[0]
    assert row.view is not None and type(row.view.sources[0]) is tuple
    assert type(row.rollout.answer_ids) is tuple and type(row.rollout.answer_ids[0]) is int
    assert type(row.problem.messages[0]) is dict and row.rollout.reward is None
    assert row.rollout.answer_logprobs is not None
    row.rollout.answer_logprobs[0] = -1.0


def test_rows_of_a_problem_share_it(tmp_path: Path) -> None:
    """Eight answers to one problem do not hold eight copies of its text."""
    save_rows(tmp_path / "r.parquet", [simple(sample_id=sample) for sample in range(8)])
    assert len({id(row.problem) for row in load_rows(tmp_path / "r.parquet")}) == 1


def test_hidden_states_are_not_saved(tmp_path: Path) -> None:
    """The documented exception: the signal comes back, without its hidden states."""
    torch = pytest.importorskip("torch")
    save_rows(tmp_path / "r.parquet", [simple(signals={"teacher": Signal(hidden_TH=torch.ones(3, 4))})])
    assert load_rows(tmp_path / "r.parquet")[0].signal == Signal()


def test_other_tools_can_read_it(tmp_path: Path) -> None:
    """Plain Parquet with named columns and a version: the schema in the module's docstring is the file's."""
    save_rows(tmp_path / "r.parquet", [simple()])
    table = pq.read_table(tmp_path / "r.parquet")
    assert table.schema.metadata[b"opdkit_rows_version"] == b"3"
    assert table.column("answer_ids").to_pylist() == [[0, 1, 2]] and table.column("gold").to_pylist() == ["2"]
    assert rows.__doc__ is not None and all(name in rows.__doc__ for name in table.column_names)


def test_fast_and_small(tmp_path: Path) -> None:
    """A million tokens with two log-probs each: well under a few seconds, and smaller than the raw arrays."""
    rng = np.random.default_rng(0)
    examples = []
    for sample in range(256):
        row = simple(sample_id=sample, num_tokens=4096)
        logprobs = -rng.exponential(0.5, 4096).astype(np.float32)
        answer_ids = tuple(rng.zipf(1.3, 4096).clip(0, 150_000).tolist())
        rollout = dataclasses.replace(row.rollout, answer_ids=answer_ids, answer_logprobs=logprobs)
        examples.append(
            dataclasses.replace(row, rollout=rollout, signals={"teacher": Signal(sampled_logprob_T=logprobs)})
        )
    start = time.process_time()
    save_rows(tmp_path / "r.parquet", examples)
    assert len(load_rows(tmp_path / "r.parquet")) == 256
    assert time.process_time() - start < 5  # 0.5 s where this was written
    assert os.path.getsize(tmp_path / "r.parquet") < 256 * 4096 * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signals": {"teacher": FLOAT64}}, "column sampled_logprob: an array is float64"),
        ({"signals": {"reference": FLOAT64}}, "an array is float64"),
        ({"views": {"reference": View(context_ids=(2**31,))}}, "token ids"),
        ({"views": {"teacher": View(context_ids=(2**31,))}}, "column view_context_ids: token ids"),
        ({"views": {"teacher": View(context_ids=(1.5,))}}, "column view_context_ids: token ids are float64"),  # type: ignore[arg-type]
        ({"problem": Problem(id="p", task="t", messages=(), meta={"a": (1, 2)})}, "meta of problem 'p' is not plain"),
        ({"problem": Problem(id="p", task="t", messages=(), gold="\ud800")}, "column gold"),
        ({"problem": Problem(id="q", task="t", messages=())}, "the answer to 'p' stands beside the problem 'q'"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Nothing is rounded, wrapped around or restated on the way to disk; a refused file does not exist."""
    with pytest.raises(ValueError, match=message):
        save_rows(tmp_path / "r.parquet", [dataclasses.replace(simple(), **change)])
    assert list(tmp_path.iterdir()) == []


def test_broken_files(tmp_path: Path) -> None:
    """Missing, cut in half, one byte changed, not rows, of a later version: a sentence each."""
    path = tmp_path / "r.parquet"
    with pytest.raises(UserError, match="there are no rows at"):
        load_rows(path)
    save_rows(path, [simple()])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        load_rows(path)
    save_rows(path, [simple(num_tokens=20_000)])
    whole = path.read_bytes()
    middle = len(whole) // 2  # inside the pages of the token ids, which carry checksums
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        load_rows(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="holds no opdkit rows"):
        load_rows(path)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"opdkit_rows_version": "1"}), path)
    with pytest.raises(UserError, match="other columns than opdkit rows"):
        load_rows(path)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"opdkit_rows_version": "4"}), path)
    with pytest.raises(UserError, match="version 4 and this opdkit reads up to 3"):
        load_rows(path)


OF_EPISODES = ("turns", "ended", "tools", "episode", "history")
SINCE_3 = ("columns", "view_by", "turn", "author", "views", *OF_EPISODES)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_rows_of_older_versions_are_still_read(version: int, tmp_path: Path) -> None:
    """Files without the columns that versions 2 and 3 added: every row comes back, was taught nothing we know of, and
    is the student's of one turn."""
    path = tmp_path / "r.parquet"
    save_rows(path, [simple(signals={"teacher": Signal(sampled_logprob_T=np.zeros(3, dtype=np.float32))})])
    table = pq.read_table(path)
    lacks = OF_EPISODES if version == 3 else SINCE_3
    since_2 = ("taught_", "student_") if version == 1 else ("none",)
    old = table.select([name for name in table.column_names if name not in lacks and not name.startswith(since_2)])
    pq.write_table(old.replace_schema_metadata({"opdkit_rows_version": str(version)}), path)
    (row,) = load_rows(path)
    assert row.taught is None and row.signal is not None and row.rollout.answer_ids == (0, 1, 2)
    assert (row.rollout.turns, row.rollout.ended, row.rollout.episode_id, row.problem.tools) == ((), "answer", 0, ())
    assert row.rollout.turn_numbers.tolist() == [0, 0, 0] and row.rollout.authors.tolist() == [0, 0, 0]
