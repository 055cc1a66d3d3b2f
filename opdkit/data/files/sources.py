"""Raw rows out of a file, a folder or a hub dataset, one at a time, each with the place it came from.

Nothing here knows what the columns mean (`schema.py` does), or how a file is read (`formats.py`). Everything streams:
one JSON line or one Parquet batch is in memory at a time. Every way a source can be broken ends in a `UserError` that
names the place.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opdkit.data.files.formats import (
    BATCH_ROWS,
    FORMATS,
    KeepColumns,
    LocatedRow,
    OnBroken,
    Row,
    batch_rows,
    file_rows,
    first_words,
    format_of,
    stem_of,
)
from opdkit.errors import UserError
from opdkit.hub import asked_once, may_be_on_hub

__all__ = ["LocatedRow", "OnBroken", "Row", "data_files", "every_row_column", "files_left_out", "rows_of", "splits_of"]

_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>[\w.\[\]%:-]+))?"
)
_SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
_NOT_DATA = {"dataset_info.json", "prepared.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def rows_of(
    source: str, *, split: str | None, keep: KeepColumns, on_broken: OnBroken | None = None
) -> Iterator[LocatedRow]:
    """The rows of `source`, in order.

    source: a `.jsonl`, `.json`, `.parquet` or `.csv` file, the texts also as `.gz`; a folder of those or one written by
    `datasets.save_to_disk` (`folder:split` picks a split); or a hub name `owner/name`, `owner/name:split` or
    `owner/name:config:split`, with `@revision` after the name for one commit, branch or tag.
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
    return file_rows(path, keep, on_broken)


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
        match = _SPLIT_FILE.match(stem_of(path))
        return [(match[1] if match else None, source)]
    if (path / "dataset_dict.json").exists():
        try:
            names = list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a complete saved dataset ({first_words(error)})") from None
        return [(name, f"{path}:{name}") for name in names]
    if (path / "state.json").exists():
        return [(None, source)]
    names = sorted({match[1] for file in data_files(path) if (match := _SPLIT_FILE.match(stem_of(file)))})
    return [(name, f"{path}:{name}") for name in names] or [(None, source)]


_LONGEST = 4096  # characters of a path


def _local_path(source: str, split: str | None) -> tuple[Path | None, str | None]:
    """The existing local path (None: look on the hub) and the split to take of it."""
    if not source:
        raise UserError('the data source is empty: give a file, a folder, a hub name or "arithmetic:merge-4:train"')
    try:
        path = Path(source).expanduser()
        is_there, has_rows = path.exists(), path.is_file() or path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # 5000 characters, a NUL, a folder that may not be looked into
        raise UserError(f"no data at {source[:60]}: {getattr(error, 'strerror', None) or error}") from None
    if has_rows:
        return path, split
    if is_there:
        raise UserError(f"{source} is no file and no folder; give a data file, a folder of them or a hub name")
    if path.is_symlink():
        raise UserError(f"no data at {source}: it is a link to nothing, or in a circle; copy the file itself here")
    head, colon, tail = source.rpartition(":")
    if colon and head and Path(head).expanduser().is_dir():
        if split is not None and split != tail:
            raise UserError(f"{source} names the split {tail!r} and split says {split!r}: keep one of them")
        return Path(head).expanduser(), tail
    match = _HUB_NAME.fullmatch(source)
    is_local = format_of(path) is not None or source.startswith(("/", "./", "../", "~"))
    if is_local or match is None or not may_be_on_hub(match["name"]):
        raise UserError(f"no data at {source}: there is no such file or folder{_near_names(path)}")
    return None, split


def _near_names(path: Path) -> str:
    """A "did you mean" for a missing path: names close to it in the nearest folder that does exist."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor a folder {folder} (folders are looked up from {Path.cwd()})"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or format_of(entry))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not near:  # train.json for train.parquet: the stem is what was meant
        near = [name for name in names if stem_of(Path(name)) == stem_of(path)][:3]
    return f"; did you mean {', '.join(str(folder / name) for name in near)}?" if near else ""


def _folder_rows(folder: Path, split: str | None, keep: KeepColumns) -> Iterator[LocatedRow]:
    if _is_saved(folder):
        return _saved_dataset_rows(folder, split, keep)
    return _files_rows(_files_of_split(folder, data_files(folder), split), keep)


def data_files(folder: Path) -> list[Path]:
    """The files with rows in a folder and below it, one format of each. Raises UserError if there is none."""
    files, _ = _one_format_each(folder)
    if not files:
        raise UserError(f"the folder {folder} holds no {', '.join(FORMATS)} file, nor a saved dataset")
    return files


def files_left_out(source: str) -> list[str]:
    """A sentence for each file of a folder that is not read, as another one there has its name in another format."""
    path, _ = _local_path(source, None)
    if path is None or not path.is_dir() or _is_saved(path):
        return []
    return [
        f"{left} is not read: by its name it holds rows of {read.name} beside it; to read it instead, name it"
        for left, read in _one_format_each(path)[1]
    ]


def _one_format_each(folder: Path) -> tuple[list[Path], list[tuple[Path, Path]]]:
    """The data files of a folder, and (file left out, file read for it): `test.json` beside `test.parquet`, and
    `test.parquet_first_row.json`, as thunlp/OPD publishes them, would bring rows twice."""
    found = [
        path
        for path in folder.rglob("*")
        if format_of(path)
        and path.name not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    ]
    first: dict[tuple[Path, str], Path] = {}
    for path in sorted(found, key=lambda path: (FORMATS.index(str(format_of(path))), path)):
        first.setdefault((path.parent, stem_of(path)), path)
    whole = {(path.parent, path.name): path for path in found}
    read, left = [], []
    for path in sorted(found):
        named = [whole.get((path.parent, path.name[:end])) for end in range(1, len(path.name))]
        other = next((other for other in named if other), None) or first[path.parent, stem_of(path)]
        other = first[other.parent, stem_of(other)]
        if other == path:
            read.append(path)
        else:
            left.append((path, other))
    return read, left


def _is_saved(folder: Path) -> bool:
    """By `datasets.save_to_disk`."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _files_rows(files: Sequence[Path], keep: KeepColumns) -> Iterator[LocatedRow]:
    for path in files:
        yield from file_rows(path, keep)


def _files_of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    if split is not None:
        chosen = [path for path in files if re.fullmatch(rf"{re.escape(split)}(?![A-Za-z]).*", stem_of(path))]
        if not chosen:
            raise UserError(f"{folder} has no file of the split {split!r}; it holds {_listed(folder, files)}")
        return chosen
    splits = sorted({match.group(1) for path in files if (match := _SPLIT_FILE.match(stem_of(path)))})
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
        raise UserError(f"{folder} is not a complete saved dataset ({first_words(error)})") from None
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
        reason = first_words(error) + (f" ({hub_says})" if hub_says else "")
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
    return batch_rows(tables, f"{name} row ")
