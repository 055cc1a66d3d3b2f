"""Raw rows out of a file, a folder or a hub dataset, one at a time, each with the place it came from.

Nothing here knows what the columns mean (`schema.py` does). Everything streams: one JSON line or one Parquet batch is
in memory at a time. Every way a source can be broken ends in a `UserError` that names the place.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.data.hub import asked_once, may_be_on_hub
from opdkit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
LocatedRow = tuple[str, Row]  # ("train.jsonl:17", {...}); lines and rows count from 1
KeepColumns = Callable[[Sequence[str]], list[str]]  # columns present -> columns worth reading (Parquet and hub only)
OnBroken = Callable[[str, str], None]  # is told the place of a line that cannot be read, and what is wrong with it

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_CSV_FIELD_BYTES = 64 << 20
BATCH_ROWS = 1024
PYTHON_ROWS = 64  # of a batch at a time as Python objects: rows with tests may have tens of megabytes
_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>[\w.\[\]%:-]+))?"
)
_SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
_JSON_HINT = " (a .json file is one list of objects, or one object a line)"
_NOT_DATA = {"dataset_info.json", "prepared.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def rows_of(
    source: str, *, split: str | None, keep: KeepColumns, on_broken: OnBroken | None = None
) -> Iterator[LocatedRow]:
    """The rows of `source`, in order.

    source: a `.jsonl`, `.json`, `.parquet` or `.csv` file; a folder of those or one written by `datasets.save_to_disk`
    (`folder:split` picks a split); or a hub name `owner/name`, `owner/name:split` or `owner/name:config:split`, with
    `@revision` after the name for one commit, branch or tag.
    on_broken: lines of one JSON lines file that cannot be read are told to it and left out.
    Raises UserError for a missing, empty-named, unreadable or broken source, with the line where there is one.
    """
    path, split = _local_path(source, split)
    if path is None:
        return _hub_rows(source, split, keep)
    if path.is_dir():
        return _folder_rows(path, split, keep)
    if split is not None:
        raise UserError(f"{path} is one file and has no split {split!r}: leave the split out, or name a folder")
    return _file_rows(path, keep, on_broken)


def every_row_column(present: Sequence[str]) -> list[str]:
    """The `keep` of who wants all columns."""
    return list(present)


def splits_of(source: str) -> list[tuple[str | None, str]]:
    """(split, source of its rows) of a file or folder. None: nothing says which split it is.

    A file's split is what its name begins with: train, test, validation, ...
    """
    path, split = _local_path(source, None)
    if path is None or split is not None:
        return [(split, source)]
    if path.is_file():
        match = _SPLIT_FILE.match(path.stem)
        return [(match[1] if match else None, source)]
    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [(name, f"{path}:{name}") for name in names]
    if (path / "state.json").exists():
        return [(None, source)]
    names = sorted({match[1] for file in data_files(path) if (match := _SPLIT_FILE.match(file.stem))})
    return [(name, f"{path}:{name}") for name in names] or [(None, source)]


_LONGEST = 4096  # characters of a path


def _local_path(source: str, split: str | None) -> tuple[Path | None, str | None]:
    """The existing local path (None: look on the hub) and the split to take of it."""
    if not source:
        raise UserError('the data source is empty: give a file, a folder, a hub name or "arithmetic:WORLD:SPLIT"')
    path = Path(source).expanduser()
    if os.path.exists(path):
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{source} is no file and no folder; give a data file, a folder of them or a hub name")
        return path, split
    if len(source) > _LONGEST:
        raise UserError(f"no data at {source[:60]}...: {len(source)} characters are more than a path has")
    head, colon, tail = source.rpartition(":")
    if colon and head and Path(head).expanduser().is_dir():
        if split is not None and split != tail:
            raise UserError(f"{source} names the split {tail!r} and split says {split!r}: keep one of them")
        return Path(head).expanduser(), tail
    match = _HUB_NAME.fullmatch(source)
    is_local = path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~"))
    if is_local or match is None or not may_be_on_hub(match["name"]):
        raise UserError(f"no data at {source}: there is no such file or folder{_near_names(path)}")
    return None, split


def _near_names(path: Path) -> str:
    """A "did you mean" for a missing path: names close to it in the nearest folder that does exist."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor a folder {folder} (folders are looked up from {Path.cwd()})"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not near:  # train.json for train.parquet: the stem is what was meant
        near = [name for name in names if Path(name).stem == path.stem][:3]
    return f"; did you mean {', '.join(str(folder / name) for name in near)}?" if near else ""


def _file_rows(path: Path, keep: KeepColumns, on_broken: OnBroken | None = None) -> Iterator[LocatedRow]:
    if path.suffix == ".jsonl":
        return _json_lines(path, on_broken)
    if path.suffix == ".json":
        return _json_items(path) if _starts_a_list(path) else _json_lines(path, on_broken)
    if path.suffix == ".parquet":
        return _parquet_rows(path, keep)
    if path.suffix == ".csv":
        return _csv_rows(path)
    raise UserError(f"{path} cannot be read: it should end in {', '.join(SUFFIXES)}")


def _starts_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_lines(path: Path, on_broken: OnBroken | None) -> Iterator[LocatedRow]:
    hint = "" if path.suffix == ".jsonl" else _JSON_HINT
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.strip()
            if not line:
                continue
            try:
                row = _json_object(line, where, hint)
            except UserError as error:
                if on_broken is None:
                    raise
                on_broken(where, str(error).removeprefix(where).strip())
            else:
                yield where, row


def _json_object(line: bytes, where: str, hint: str) -> Row:
    row = _parse_json(line, where, hint)
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {_json_kind(row)} where each line should be one JSON object")
    return row


def _json_items(path: Path) -> Iterator[LocatedRow]:
    items = _parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    assert isinstance(items, list)
    for number, row in enumerate(items, start=1):
        where = f"{path} item {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is {_json_kind(row)} where each item should be one JSON object")
        yield where, row


def _parse_json(raw: bytes, where: str, hint: str = "") -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(0) > len(raw) // 4 else "latin-1"
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}); "
            f"convert the file first, e.g. iconv -f {guess} -t UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f" line {error.lineno}"
        raise UserError(f"{where}{line} is not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets nested 100000 deep
        raise UserError(f"{where} is not JSON that can be read: {_first_words(error)}") from None


def _csv_rows(path: Path) -> Iterator[LocatedRow]:
    """Rows under a header line; every value is text, and an empty field is unknown."""
    csv.field_size_limit(MAX_CSV_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file, strict=True)
        try:
            for row in lines:
                where = f"{path}:{lines.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where} has not as many fields as the header has names")
                yield where, {name: value if value.strip() else None for name, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{path}:{lines.line_num} is not CSV that can be read: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 (behind line {lines.line_num}: {error.reason}); convert the file first, e.g. "
                "iconv -f latin-1 -t UTF-8"
            ) from None


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _parquet_rows(path: Path, keep: KeepColumns) -> Iterator[LocatedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # One row group at a time in memory, and a few rows of it as Python objects.
            batches = file.iter_batches(BATCH_ROWS, columns=keep(file.schema_arrow.names))
            yield from _batch_rows(batches, f"{path} row ")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({_first_words(error)}); copy or download it again"
        ) from None


def _batch_rows(batches: Iterator[pa.RecordBatch | pa.Table], prefix: str) -> Iterator[LocatedRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, PYTHON_ROWS):
            try:
                rows = batch.slice(start, PYTHON_ROWS).to_pylist()
            except UnicodeDecodeError:
                raise UserError(
                    f"a text column after {prefix}{number} is not UTF-8; write the file again as UTF-8"
                ) from None
            for row in rows:
                number += 1
                yield f"{prefix}{number}", row


def _folder_rows(folder: Path, split: str | None, keep: KeepColumns) -> Iterator[LocatedRow]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _saved_dataset_rows(folder, split, keep)
    return _files_rows(_files_of_split(folder, data_files(folder), split), keep)


def data_files(folder: Path) -> list[Path]:
    """The files with rows in a folder and below it. Raises UserError if there is none."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and path.name not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"the folder {folder} holds no {', '.join(SUFFIXES)} file, nor a saved dataset")
    return files


def _files_rows(files: Sequence[Path], keep: KeepColumns) -> Iterator[LocatedRow]:
    for path in files:
        yield from _file_rows(path, keep)


def _files_of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    if split is not None:
        chosen = [path for path in files if re.fullmatch(rf"{re.escape(split)}(?![A-Za-z]).*", path.stem)]
        if not chosen:
            raise UserError(f"{folder} has no file of the split {split!r}; it holds {_listed(folder, files)}")
        return chosen
    splits = sorted({match.group(1) for path in files if (match := _SPLIT_FILE.match(path.stem))})
    if len(splits) > 1:  # training on the test file by accident is worse than one more word in the recipe
        raise UserError(f"{folder} holds the splits {', '.join(splits)}: choose one, e.g. {folder}:{splits[0]}")
    return list(files)


def _listed(folder: Path, files: Sequence[Path]) -> str:
    names = [str(path.relative_to(folder)) for path in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _saved_dataset_rows(folder: Path, split: str | None, keep: KeepColumns) -> Iterator[LocatedRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow, fsspec or json find broken inside
        raise UserError(f"{folder} is not a complete saved dataset ({_first_words(error)})") from None
    return _dataset_rows(loaded, str(folder), split, keep)


def _hub_rows(source: str, split: str | None, keep: KeepColumns) -> Iterator[LocatedRow]:
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    name, config = match["name"], match["config"]
    if split is not None and match["split"] is not None and split != match["split"]:
        raise UserError(f"{source} names the split {match['split']!r} and split says {split!r}: keep one of them")
    split = match["split"] or split
    import datasets

    hub_says = None
    try:
        with asked_once(name, "dataset", match["revision"]) as hub_says:
            loaded = datasets.load_dataset(name, config, split=split, revision=match["revision"])
    except Exception as error:  # the network, the hub's refusals, a wrong config or split: all are the user's to read
        reason = _first_words(error) + (f" ({hub_says})" if hub_says else "")
        raise UserError(
            f"there is no such folder or file {name}, and the hub dataset {name} could not be loaded: {reason}; "
            "without a connection, copy the data set here and name its folder"
        ) from None
    return _dataset_rows(loaded, name, None, keep)


def _dataset_rows(loaded: Any, name: str, split: str | None, keep: KeepColumns) -> Iterator[LocatedRow]:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        splits = sorted(loaded)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            wanted = "choose one" if split is None else f"it has no split {split!r}"
            raise UserError(f"{name} holds the splits {', '.join(splits)}: {wanted}, e.g. {name}:{splits[0]}")
        loaded = loaded[split]
    elif split is not None:
        raise UserError(f"{name} is one saved dataset and has no split {split!r}: leave the split out")
    tables = loaded.select_columns(keep(loaded.column_names)).with_format("arrow").iter(BATCH_ROWS)
    return _batch_rows(tables, f"{name} row ")


def _first_words(error: BaseException, limit: int = 200) -> str:
    """The message of a foreign exception on one line, cut: it goes inside a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
