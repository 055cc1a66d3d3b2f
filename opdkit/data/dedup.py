"""Remove from one file what is, or nearly is, in other data sets; or only say what would go (contamination).

    questions of A, of each B  ->  the most alike B of every A  ->  A without the rows that have one

Rows are compared by their bare questions (`templates.bare_question`), so instructions do not matter. A row of A whose
question cannot be found stays, and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from opdkit.data.files.formats import is_list
from opdkit.data.files.sources import Row, data_files, rows_of, splits_of
from opdkit.data.files.unusable import Unusable
from opdkit.data.files.write import file_to_write, replace_files
from opdkit.data.prepared import is_prepared
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.templates import bare_question
from opdkit.data.similar import METHODS, Embed, EmbeddingIndex, Embeddings, Index, Method, same_numbers
from opdkit.errors import UserError

_COPIED = (".jsonl", ".json", ".parquet")  # formats whose rows are copied as they are
_TRAINING = {"train"}  # splits that are left out where a folder is given to compare with

Progress = Callable[[int], None]  # is told the number of questions compared so far


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupOptions:
    """threshold: of `ngram`, `containment` and `embedding`; n: of the first two (`similar.py`)."""

    method: Method = "ngram"
    threshold: float = 0.5
    n: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    where: str  # of the row of A
    other: str  # of the row of B
    similarity: float
    same_numbers: bool
    question: str
    other_question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """pairs: the rows of A that have one alike in this set, the most alike first."""

    source: str
    num_questions: int
    num_not_compared: int
    pairs: list[Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupReport:
    source: str
    options: DedupOptions
    num_rows: int
    num_not_compared: int
    num_removed: int
    against: list[Against]


@dataclass(slots=True)
class _Questions:
    where: list[str]
    text: list[str]
    not_compared: list[tuple[str, str]]  # (where, why)

    @property
    def num_rows(self) -> int:
        return len(self.where) + len(self.not_compared)


def dedup(
    source: str,
    against: Sequence[str],
    *,
    out: Path | None,
    options: DedupOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    embed: Embed | None = None,
) -> DedupReport:
    """Compare `source` with each of `against`, and write what is left of it to `out` (None: only compare).

    source: one .jsonl, .json or .parquet file; its rows are copied as they are. against: files, hub names, or folders,
    of which every file counts that is not training data. embed: what the method `embedding` compares by.
    Raises UserError for what is missing, broken or empty.
    """
    options = options or DedupOptions()
    _check(source, out, options, overwrite)
    own = _questions(source)
    embeddings = None
    if options.method == "embedding":
        if embed is None:
            raise UserError("--method embedding needs --model: a sentence encoder in Hugging Face format")
        embeddings = Embeddings(embed)
        embeddings.of(own.text)
    found: list[Against] = []
    for other in _expanded(against, source):
        found.append(_compare(own, other, options, embeddings, progress, done=len(found) * len(own.where)))
    removed = {pair.where for entry in found for pair in entry.pairs}
    if out is not None:
        if len(removed) == own.num_rows:
            raise UserError(f"every row of {source} would go, so {out} is not written; check --against and --threshold")
        _write_rest(Path(source), out, removed)
    return DedupReport(
        source=source,
        options=options,
        num_rows=own.num_rows,
        num_not_compared=len(own.not_compared),
        num_removed=len(removed),
        against=found,
    )


def check_report(path: Path, *, overwrite: bool) -> None:
    """Before anything is compared. Raises UserError where `write_report` would fail, or write over a file."""
    if not file_to_write(path).parent.is_dir():
        raise UserError(f"--report {path} is not a file in a folder that exists; name another")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; name another --report, or give --overwrite to replace it")


def write_report(report: DedupReport, path: Path) -> None:
    """Every pair, as JSON."""
    try:
        path.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {path} cannot be written: {error.strerror or error}") from None


def _check(source: str, out: Path | None, options: DedupOptions, overwrite: bool) -> None:
    if options.method not in METHODS:
        raise UserError(f"--method {options.method} is not known; choose from {', '.join(METHODS)}")
    if not 0 < options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold} must be above 0 and at most 1")
    if options.n < 1:
        raise UserError(f"--ngram {options.n} must be 1 or more")
    if out is None:
        return
    file_to_write(out)
    if not Path(source).is_file() or Path(source).suffix not in _COPIED:
        raise UserError(
            f"{source} is not one {', '.join(_COPIED)} file, so nothing can be removed from it; name a file"
        )
    if out.suffix != Path(source).suffix:
        raise UserError(
            f"--out {out} should end in {Path(source).suffix}, as {source} does: rows are copied as they are"
        )
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; name another --out, or give --overwrite to replace it")


def _questions(source: str) -> _Questions:
    schema = Schema(task="math", instruction="none", require_gold=False)
    found = _Questions([], [], [])
    for where, row in rows_of(source, split=None, keep=schema.keep):
        try:
            text = question_of(row, schema)
        except Unusable as error:
            found.not_compared.append((where, str(error)))
        else:
            found.where.append(where)
            found.text.append(text)
    if not found.text:
        why = f"; the first ({found.not_compared[0][0]}): {found.not_compared[0][1]}" if found.not_compared else ""
        raise UserError(f"{source} has no row with a question to compare{why}")
    return found


def question_of(row: Row, schema: Schema) -> str:
    """The bare question of a row of any schema the reader knows. Raises Unusable."""
    if is_prepared(row) and isinstance(row.get("question"), str):
        return str(row["question"])
    return bare_question(schema.messages(row)[-1]["content"]).question


def _expanded(against: Sequence[str], source: str) -> Iterator[str]:
    """A folder becomes its files, or its splits, without those for training and without `source` itself."""
    if not against:
        raise UserError("nothing to compare with: give --against a file, a folder or a hub name")
    for other in against:
        folder = Path(other).expanduser()
        if not folder.is_dir():
            yield other  # who names a training file means it
            continue
        saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        files = [folder] if saved else [file for file in data_files(folder) if file.resolve() != Path(source).resolve()]
        chosen = [part for file in files for split, part in splits_of(str(file)) if split not in _TRAINING]
        if not chosen:
            raise UserError(f"--against {other} holds no evaluation file; name training files one by one")
        yield from chosen


def _compare(
    own: _Questions,
    source: str,
    options: DedupOptions,
    embeddings: Embeddings | None,
    progress: Progress | None,
    done: int,
) -> Against:
    other = _questions(source)
    index: Index | EmbeddingIndex
    if embeddings is None:
        index = Index(other.text, method=options.method, threshold=options.threshold, n=options.n)
    else:
        index = EmbeddingIndex(other.text, threshold=options.threshold, embeddings=embeddings)
    pairs: list[Pair] = []
    for place, question in enumerate(own.text):
        if progress is not None:
            progress(done + place + 1)
        match = index.nearest(question)
        if match is not None:
            pairs.append(
                Pair(
                    where=own.where[place],
                    other=other.where[match.place],
                    similarity=match.similarity,
                    same_numbers=same_numbers(question, other.text[match.place]),
                    question=question,
                    other_question=other.text[match.place],
                )
            )
    pairs.sort(key=lambda pair: -pair.similarity)
    return Against(source=source, num_questions=len(other.text), num_not_compared=len(other.not_compared), pairs=pairs)


def _write_rest(source: Path, out: Path, removed: set[str]) -> None:
    """The rows of `source` that are not `removed`, byte for byte (JSON lines) or value for value."""
    with replace_files(out.parent, [out.name]) as part:
        if source.suffix == ".parquet":
            _rest_of_parquet(source, part(out.name), removed)
        elif source.suffix == ".json" and is_list(source):
            items = json.loads(source.read_text(encoding="utf-8-sig"))
            rest = [item for number, item in enumerate(items, start=1) if f"{source} item {number}" not in removed]
            part(out.name).write_text(json.dumps(rest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            with source.open("rb") as lines, part(out.name).open("wb") as file:
                for number, line in enumerate(lines, start=1):
                    if f"{source}:{number}" not in removed:
                        file.write(line)


def _rest_of_parquet(source: Path, out: Path, removed: set[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(source) as file, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for batch in file.iter_batches(1024):
            kept = [f"{source} row {number + place}" not in removed for place in range(1, batch.num_rows + 1)]
            number += batch.num_rows
            writer.write_batch(batch.filter(pa.array(kept)))
