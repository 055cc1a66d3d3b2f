"""Search in a collection of your own as a tool: BM25, by the package bm25s (`pip install "opdkit[search]"`).

    environment = { name = "search", collection = "wiki.jsonl", k = 3 }

The collection is a .jsonl or .parquet file, a document a row, with a column `text` and perhaps `title` and `id`. It is
read and indexed once in each worker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np

from opdkit.data.files.sources import every_row_column, rows_of
from opdkit.errors import UserError
from opdkit.rollouts.environments.functions import FunctionTools, ToolError, pure
from opdkit.tasks.base import Option

_MAX_QUERY_CHARACTERS = 1000
_WORD = re.compile(r"\w+")


class Search(FunctionTools):
    """One tool, `search(query)`."""

    def __init__(
        self,
        collection: Annotated[str, Option("a .jsonl or .parquet file with a column text, and perhaps title")],
        k: Annotated[int, Option("documents of a result", at_least=1)] = 3,
        max_characters: Annotated[int, Option("of each document", at_least=1)] = 1000,
    ) -> None:
        path = Path(collection).expanduser().resolve()
        index = _index(path, path.stat().st_mtime_ns if path.is_file() else 0)

        @pure
        def search(query: str) -> str:
            if len(query) > _MAX_QUERY_CHARACTERS:
                raise ToolError(f"a query has {_MAX_QUERY_CHARACTERS} characters at most")
            found = index.best(query, k)
            shown = [f"[{place}] {document.shown(max_characters)}" for place, document in enumerate(found, 1)]
            return "\n\n".join(shown) or "nothing was found"

        description = f"Searches a collection of {len(index.documents)} documents and returns the {k} best."
        argument = {"type": "string", "description": "words to look for"}
        parameters = {"type": "object", "properties": {"query": argument}, "required": ["query"]}
        function = {"name": "search", "description": description, "parameters": parameters}
        super().__init__([search], [{"type": "function", "function": function}])


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    text: str

    def shown(self, max_characters: int) -> str:
        text = self.text if len(self.text) <= max_characters else f"{self.text[:max_characters].rstrip()} ..."
        return f"{self.title}\n{text}".strip()


class Index:
    """BM25 over the words of the documents."""

    def __init__(self, documents: Sequence[Document]) -> None:
        try:
            import bm25s
        except ImportError:
            raise UserError(
                'the environment search needs the package bm25s; install it: pip install "opdkit[search]"'
            ) from None
        self.documents = documents
        words = [_words(f"{document.title} {document.text}") for document in documents]
        self._known = {word for each in words for word in each}
        self._bm25 = bm25s.BM25()
        self._bm25.index(words, show_progress=False)

    def best(self, query: str, k: int) -> list[Document]:
        """Those with a word of the query, the best first; of equal ones, the first in the collection."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._bm25.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:k]
        return [self.documents[place] for place in order if scores[place] > 0]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@lru_cache(maxsize=4)
def _index(path: Path, changed_ns: int) -> Index:
    """Once for all episodes of a worker. Raises UserError for what is no collection."""
    if not path.is_file():
        raise UserError(f"search: there is no file {path} (collection)")
    documents = []
    for place, row in rows_of(str(path), split=None, keep=every_row_column):
        text, title = row.get("text"), row.get("title", "")
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise UserError(f"search: {place} has no text in a column text (collection = {path})")
        documents.append(Document(title or "", text))
    if not documents:
        raise UserError(f"search: {path} holds no documents (collection)")
    return Index(documents)
