"""What data sets are called in the names of files and metrics."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

MOST_BYTES = 150  # of a data set's name in a file's: the rest of 255 is for what stands before and behind it


def slug(source: str) -> str:
    """A file name for a data set; a long one ends in a digest."""
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in source).strip("._")
    if len(plain.encode()) <= MOST_BYTES:
        return plain
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{plain.encode()[-MOST_BYTES:].decode(errors='ignore').lstrip('._')}-{digest}"


def metric_names(sources: Iterable[str]) -> dict[str, str]:
    """By source, what it is called in `eval/<name>/...`; two of one name are told apart by a number."""
    found, seen = {}, Counter[str]()
    for source in sources:
        name = slug(source) or "data"
        seen[name] += 1
        found[source] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return found
