"""Prepared problems to Parquet, a limited number of bytes at a time; files that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opdkit.data.prepared import arrow_schema, row_of, verl_row_of
from opdkit.errors import UserError
from opdkit.types import Problem

_GROUP_ROWS = 1000
_GROUP_CHARACTERS = 64 << 20  # of tests and texts in one row group: a reader holds one of them


def write_parquet(
    path: Path, problems: Sequence[Problem], questions: Sequence[str], *, format: str, split: str, source: str
) -> None:
    """questions: the bare question of each problem. source: the name of the data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(format)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in _groups(problems, questions, format, split, source):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


@contextmanager
def replace_files(folder: Path, names: Sequence[str], outdated: Sequence[str] = ()) -> Iterator[Callable[[str], Path]]:
    """Gives paths in a folder of its own; at the end the files `names` are moved to `folder`, the last one last, and
    `outdated` ones are removed from it. If anything is raised, `folder` stays as it was."""
    for name in names:
        file_to_write(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield lambda name: scratch / name
        for name in outdated:
            (folder / name).unlink(missing_ok=True)
        for name in names:
            os.replace(scratch / name, file_to_write(folder / name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _groups(
    problems: Sequence[Problem], questions: Sequence[str], format: str, split: str, source: str
) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    num_characters = 0
    for problem, question in zip(problems, questions, strict=True):
        row = row_of(problem, question)
        num_characters += sum(len(value) for value in row.values() if isinstance(value, str))
        rows.append(verl_row_of(problem, question, split=split, data_source=source) if format == "verl" else row)
        if len(rows) == _GROUP_ROWS or num_characters > _GROUP_CHARACTERS:
            yield rows
            rows, num_characters = [], 0
    if rows:
        yield rows


SHOWN = 200  # characters of a path that is refused for its length


def file_to_write(path: Path) -> Path:
    """The file itself, behind any links. Raises UserError where no file can be: a folder, a device, a loop of links,
    a name that is too long."""
    try:
        real = path.resolve()
        what = what_is_at(real) if real.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)[:SHOWN]} cannot be written ({reason}); choose another file") from None
    if what not in (None, "a file"):
        raise UserError(f"{path} is {what}, not a file; choose another file")
    return real


def what_is_at(path: Path) -> str:
    """In words, behind any links."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing"
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), "a device")
