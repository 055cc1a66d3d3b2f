"""Files that are appended to: what a crash cut is cut off, what somebody else wrote is not touched."""

from pathlib import Path

import pytest

from opdkit.errors import UserError
from opdkit.run.jsonl import append_lines, open_lines, put_in_order

ROWS = [{"a": 1}, {"a": "\u2028 two\nlines"}, {"a": None}]


def test_every_cut_keeps_the_whole_lines(tmp_path: Path) -> None:
    """Cut anywhere, opened, appended to: whole lines and the new one, never a line made of two."""
    path = tmp_path / "deep" / "x.jsonl"
    assert open_lines(path) == []
    append_lines(path, ROWS)
    whole = path.read_text()
    ends = [i + 1 for i, c in enumerate(whole) if c == "\n"]
    for cut in range(3, len(whole) + 1):
        path.write_text(whole[:cut])
        kept = open_lines(path)
        assert kept == ROWS[: len(kept)] and len(kept) >= sum(end <= cut for end in ends)
        append_lines(path, [{"b": 2}])
        assert open_lines(path) == [*kept, {"b": 2}]


@pytest.mark.parametrize("text", ["# notes\n", "notes", '{"a": 1}\nbroken\n{"a": 2}\n', "[1]\n\n[2]\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x:1 is not JSON|x:2 is not JSON|something else"):
        open_lines(path)
    assert path.read_text() == text


def test_lines_are_put_in_order(tmp_path: Path) -> None:
    """As they were asked; what was asked another time stays, behind them."""
    path, rows = (
        tmp_path / "x.jsonl",
        [{"id": name, "number": n} for name, n in (("c", 0), ("b", 1), ("a", 0), ("b", 0))],
    )
    append_lines(path, [{"identity": 1}, *rows])
    put_in_order(path, [("a", 0), ("b", 0), ("b", 1)], lambda row: (row["id"], row["number"]), header=True)
    assert open_lines(path) == [{"identity": 1}, rows[2], rows[3], rows[1], rows[0]]
