"""The shell of a page: one self-contained file, no script, no network.

The Content-Security-Policy allows one style sheet, by its digest, and nothing else: even text that escaped `markup.py`
could neither run nor load nor restyle anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from opdkit.data.files.write import file_to_write
from opdkit.errors import UserError
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.style import COLOURS, FIGURE, PAGE
from opdkit.run.folder import atomic_write

_TITLE = " · opdkit"
_OURS = f"{_TITLE}</title>".encode()


def document(title: str, sections: Sequence[Html | None]) -> str:
    style = COLOURS + FIGURE + PAGE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        ),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title}{_TITLE}"),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *sections)), lang="en") + "\n"


def write_page(path: Path, text: str) -> None:
    """Whole or not at all. Raises UserError where it cannot be written, and for another file than a page of ours."""
    real = file_to_write(path)
    if real.is_file() and real.stat().st_size and _OURS not in real.read_bytes():
        raise UserError(f"{path} exists and is no page of opdkit; choose another file, or remove it")
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); make its folder writable, or choose another"
        ) from None


def facts(known: Mapping[str, str]) -> Html:
    """Names and values, a line each."""
    return tag("dl", *(join(tag("dt", key), tag("dd", value)) for key, value in known.items()), class_="facts")


def small(text: str) -> Html:
    return tag("p", text, class_="quiet small")


def table(head: Sequence[str | None], rows: Sequence[Sequence[str]]) -> Html:
    """Scrolls sideways where it does not fit."""
    titles = tag("thead", tag("tr", *(tag("th", title) for title in head)))
    cells = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", titles, tag("tbody", *cells)), class_="scroll")
