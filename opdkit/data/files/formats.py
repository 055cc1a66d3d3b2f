"""The rows of one file: JSON lines, JSON, Parquet or CSV, the texts also as `.gz`.

A file is a stranger's: whatever is in it, it is read or refused in one sentence, within bounded time and memory. There
is a most for a line, a row and a JSON list, and for what a compressed file comes to: a kilobyte may hold a gigabyte.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from opdkit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
LocatedRow = tuple[str, Row]  # ("train.jsonl:17", {...}); lines and rows count from 1
KeepColumns = Callable[[Sequence[str]], list[str]]  # columns present -> columns worth reading (Parquet and hub only)
OnBroken = Callable[[str, str], None]  # is told the place of a line that cannot be read, and what is wrong with it

FORMATS = (".parquet", ".jsonl", ".json", ".csv")  # of the same rows in several, the first is taken
GZ = ".gz"
_READ = "it should end in .jsonl, .json, .parquet, .csv (the texts also with .gz)"

MAX_LINE_BYTES = 256 << 20  # rows with tests may have tens of megabytes
MAX_LIST_BYTES = 1 << 30  # of a .json list, which is held whole
MAX_ROW_VALUES = 1_000_000  # numbers and texts in one Parquet row; as Python objects they take some 100 MB
MAX_CSV_FIELD_BYTES = 64 << 20
UNPACKED_BYTES, UNPACKED_RATIO = 256 << 20, 50  # a file may come to the larger of both; text comes to some 10 times
MAX_EMPTY_LINES = 1_000_000
BATCH_ROWS = 1024
BATCH_BYTES, DICTIONARY_BYTES = 64 << 20, 1 << 30
PYTHON_ROWS = 64  # of a batch at a time as Python objects
_JSON_HINT = " (a .json file is one list of objects, or one object a line)"
_BOM = b"\xef\xbb\xbf"


def format_of(path: Path) -> str | None:
    """ ".jsonl" of `train.jsonl` and `train.jsonl.gz`; None: it is no format that is read."""
    name = path.name.removesuffix(GZ)
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS and (name == path.name or suffix != ".parquet") else None


def stem_of(path: Path) -> str:
    """The name without its format: `train` of `train.jsonl.gz`."""
    return Path(path.name.removesuffix(GZ)).stem if format_of(path) else path.stem


def file_rows(path: Path, keep: KeepColumns, on_broken: OnBroken | None = None) -> Iterator[LocatedRow]:
    """The rows of one file, in order. on_broken: of JSON lines, what cannot be read is told to it and left out.

    Raises UserError for what is no such file, or broken, with the line where there is one.
    """
    kind = format_of(path)
    if kind is None:
        hint = "; unpack it first" if path.suffix in (GZ, ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz") else ""
        raise UserError(f"{path} cannot be read: {_READ}{hint}")
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'} where a data file is expected")
    if kind == ".parquet":
        return _parquet_rows(path, keep)
    return _text_rows(path, kind, on_broken)


def _text_rows(path: Path, kind: str, on_broken: OnBroken | None) -> Iterator[LocatedRow]:
    try:
        with _opened(path) as file:
            if kind == ".csv":
                yield from _csv_rows(path, file)
            elif kind == ".json" and is_list(path):
                yield from _json_items(path, file)
            else:
                yield from _json_lines(path, file, _JSON_HINT if kind == ".json" else "", on_broken)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def is_list(path: Path) -> bool:
    """Whether a .json file is one list."""
    with _opened(path) as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


class _Ungzipped(io.RawIOBase):
    """The bytes that a gzip file packs. Raises UserError where it is broken, or comes to more than text comes to."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._num = path, gzip.GzipFile(path), 0
        self._most = max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size)
        with path.open("rb") as packed:  # the last four bytes say what it comes to, if it is whole and they do not lie
            packed.seek(max(0, path.stat().st_size - 4))
            self._claimed = int.from_bytes(packed.read(4), "little")
        if self._claimed > self._most:
            self._most = 1 << 20  # enough to see whether it is only cut short

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            num = self._file.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self._path} is not a complete gzip file ({error}); copy or download it again") from None
        self._num += num
        if self._num > self._most:
            raise UserError(
                f"{self._path} is cut short, or unpacks to more than {max(self._most, self._claimed) >> 20} MiB, over "
                f"{UNPACKED_RATIO} times its size, as no data set does; copy it again, or gunzip it first"
            )
        return num

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path) -> BinaryIO:
    return io.BufferedReader(_Ungzipped(path), 1 << 16) if path.suffix == GZ else path.open("rb")


def _json_lines(path: Path, file: BinaryIO, hint: str, on_broken: OnBroken | None) -> Iterator[LocatedRow]:
    number = num_empty = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{where} has more than {MAX_LINE_BYTES >> 20} MiB; {_ONE_OBJECT_A_LINE}")
        line = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if not line:
            num_empty += 1
            if num_empty > MAX_EMPTY_LINES:
                raise UserError(f"{path} has more than {MAX_EMPTY_LINES:,} empty lines, as no data set does")
            continue
        try:
            row = _json_object(line, where, hint)
        except UserError as error:
            if on_broken is None:
                raise
            on_broken(where, str(error).removeprefix(where).strip())
        else:
            yield where, row


_ONE_OBJECT_A_LINE = "each line should be one JSON object, with one problem"


def _json_object(line: bytes, where: str, hint: str) -> Row:
    row = _parse_json(line, where, hint)
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {_json_kind(row)} where each line should be one JSON object")
    return row


def _json_items(path: Path, file: BinaryIO) -> Iterator[LocatedRow]:
    for number, row in enumerate(read_list(path, file), start=1):
        where = f"{path} item {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is {_json_kind(row)} where each item should be one JSON object")
        yield where, row


def read_list(path: Path, file: BinaryIO) -> list[Any]:
    """The items of a .json list. Raises UserError."""
    raw = bytearray()
    while chunk := file.read(1 << 20):
        raw += chunk
        if len(raw) > MAX_LIST_BYTES:
            most = f"{MAX_LIST_BYTES >> 20} MiB"
            raise UserError(f"{path} is a JSON list of more than {most}; write one object a line (.jsonl)")
    items = _parse_json(bytes(raw).removeprefix(_BOM), str(path))
    assert isinstance(items, list)
    return items


def _parse_json(raw: bytes, where: str, hint: str = "") -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}); {_convert(raw)}"
        ) from None
    except json.JSONDecodeError as error:
        if b"\0" in raw:
            raise UserError(f"{where} holds NUL bytes: {_why_nul(raw)}") from None
        line = "" if error.lineno == 1 else f" line {error.lineno}"
        raise UserError(f"{where}{line} is not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets nested 100000 deep
        raise UserError(f"{where} is not JSON that can be read: {first_words(error)}") from None


def _convert(raw: bytes) -> str:
    """How to make UTF-8 of these bytes."""
    is_wide = raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(0) > len(raw) // 4
    return f"convert the file first, e.g. iconv -f {'UTF-16' if is_wide else 'latin-1'} -t UTF-8"


def _why_nul(raw: bytes) -> str:
    if raw.count(0) > len(raw) // 4 and raw.strip(b"\0"):
        return f"it may be UTF-16; {_convert(raw)}"
    return "it was not written completely, or is no text; copy or make it again"


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[LocatedRow]:
    """Rows under a header line; every value is text, and an empty field is unknown."""
    csv.field_size_limit(MAX_CSV_FIELD_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.DictReader(iter(lambda: text.readline(MAX_LINE_BYTES), ""), strict=True)
    try:
        for row in lines:
            where = f"{path}:{lines.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where} has not as many fields as the header has names")
            if any("\0" in text for text in (*row, *row.values())):
                raise UserError(f"{where} holds NUL bytes: it may be UTF-16, or is no text; convert or copy it again")
            yield where, {name: value if value.strip() else None for name, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num} is not CSV that can be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (behind line {lines.line_num}: {error.reason}); {_convert(error.object)}"
        ) from None


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _parquet_rows(path: Path, keep: KeepColumns) -> Iterator[LocatedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            meta, size = file.metadata, path.stat().st_size
            if meta.num_rows > size:
                raise UserError(
                    f"{path} says that it holds {meta.num_rows:,} rows in {size:,} bytes, as no data set does"
                )
            batches = file.iter_batches(_rows_at_once(meta), columns=keep(file.schema_arrow.names))
            yield from batch_rows(batches, f"{path} row ", max(UNPACKED_BYTES, UNPACKED_RATIO * size))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({first_words(error)}); copy or download it again"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a data set") from None


def _rows_at_once(meta: Any) -> int:
    """How many rows of a Parquet file come to about `BATCH_BYTES`, and never to more than `DICTIONARY_BYTES`: where a
    column has a dictionary, every row may hold its longest text."""
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(meta.num_columns)]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    longest = max((chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=1)
    rows = min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, unpacked), DICTIONARY_BYTES // max(1, longest))
    return max(1, rows)


def batch_rows(
    batches: Iterator[pa.RecordBatch | pa.Table], prefix: str, max_bytes: int | None = None
) -> Iterator[LocatedRow]:
    """The rows of Arrow batches, a few at a time as Python objects. max_bytes: of all of them together."""
    number = num_bytes = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            part = batch.slice(start, PYTHON_ROWS)
            if _num_values(part) > MAX_ROW_VALUES or part.nbytes > MAX_LINE_BYTES:  # one by one, to say which
                part = batch.slice(start, 1)
                if _num_values(part) > MAX_ROW_VALUES or part.nbytes > MAX_LINE_BYTES:
                    raise UserError(
                        f"{prefix}{number + 1} holds {_num_values(part):,} values in {part.nbytes >> 20} MiB, as no "
                        f"problem does (at most {MAX_ROW_VALUES:,} in {MAX_LINE_BYTES >> 20} MiB)"
                    )
            num_bytes += sum(map(_num_bytes, part.columns))
            if max_bytes is not None and num_bytes > max_bytes:
                raise UserError(
                    f"{prefix.removesuffix(' row ')} unpacks to more than {max_bytes >> 20} MiB, over {UNPACKED_RATIO} "
                    "times its size, as no data set does; write it again without its repetitions"
                )
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:
                raise UserError(
                    f"a text column after {prefix}{number} is not UTF-8; write the file again as UTF-8"
                ) from None
            except (ValueError, OverflowError) as error:  # dates after the year 9999, and nanoseconds
                raise UserError(
                    f"a column after {prefix}{number} holds what Python cannot: {first_words(error)}"
                ) from None
            start += part.num_rows
            for row in rows:
                number += 1
                yield f"{prefix}{number}", row


def _num_bytes(column: Any) -> int:
    """With every text of a dictionary written out where it stands."""
    import pyarrow as pa

    return int((column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).nbytes)


def _num_values(part: pa.RecordBatch | pa.Table) -> int:
    """Numbers and texts in it, also inside of lists and tables."""
    return sum(_num_leaves(chunk) for column in part.columns for chunk in getattr(column, "chunks", [column]))


def _num_leaves(array: Any) -> int:
    import pyarrow as pa

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _num_leaves(array.storage)
    if pa.types.is_struct(kind):
        return len(array) + sum(_num_leaves(field) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return len(array) + _num_leaves(array.flatten())
    if pa.types.is_map(kind):
        return len(array) + 2 * len(array.items)
    return len(array)


def first_words(error: BaseException, limit: int = 200) -> str:
    """The message of a foreign exception on one line, cut: it goes inside a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
