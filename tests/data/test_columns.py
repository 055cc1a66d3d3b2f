"""Columns that a recipe names reach the problem, from every kind of row, and nothing else does."""

import json
from pathlib import Path

from opdkit.data.prepared import row_of, verl_row_of
from opdkit.data.readers import joined, load_problems
from opdkit.types import Problem

NAMES = ("domain", "extra.hint", "level", "absent")
ROW = {"prompt": "1+1=", "answer": "2", "domain": "math", "extra": {"hint": "two"}, "level": 3.0, "unused": "x"}


def test_columns_of_any_type_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [ROW, {**ROW, "prompt": "1+2=", "domain": None, "level": [1, "é"], "extra": {"hint": " "}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_problems(path, task="math", kept=NAMES)
    assert [dict(p.columns) for p in found.problems] == [
        {"domain": "math", "extra.hint": "two", "level": "3"},
        {"level": '[1, "é"]'},
    ]
    plain = load_problems(path, task="math")
    assert all(p.columns == {} for p in plain.problems) and plain.fingerprint != found.fingerprint


def test_prepared_rows_keep_theirs_in_meta(tmp_path: Path) -> None:
    problem = Problem(
        id="1", task="math", messages=({"role": "user", "content": "1+1="},), gold="2", meta={"domain": "math"}
    )
    for row in (row_of(problem, "1+1="), verl_row_of(problem, "1+1=", split="train", data_source="x")):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (found,) = load_problems(path, task="math", kept=("domain", "data_source")).problems
        assert found.columns["domain"] == "math"


def test_parquet_reads_the_columns_it_needs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "rows.parquet")
    (found,) = load_problems(tmp_path / "rows.parquet", task="math", kept=NAMES).problems
    assert found.columns == {"domain": "math", "extra.hint": "two", "level": "3"}


def test_joined_sets_have_ids_of_their_own() -> None:
    sets = {name: load_problems("arithmetic:merge-3:train", task="arithmetic", limit=3) for name in ("a", "b")}
    both = joined(sets)
    assert len({p.id for p in both.problems}) == 6 and both.num_duplicate_ids == 3
    assert [len(part.problems) for part in both.parts.values()] == [3, 3]
