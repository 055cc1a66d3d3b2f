"""The shell of a page: one self-contained file, no network.

The Content-Security-Policy allows one style sheet and one script, by their digests, and nothing else: even text that
escaped `markup.py` could neither run nor load nor restyle anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdkit.data.files.write import file_to_write
from opdkit.errors import UserError
from opdkit.reporting.html import script, style
from opdkit.reporting.html.answer_style import ANSWERS
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.run.folder import atomic_write

_TITLE = " · opdkit"
_OURS = f"{_TITLE}</title>".encode()
STYLE = style.COLOURS + style.FIGURE + style.PAGE + ANSWERS + style.PAPER


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a page that stands in its contents."""

    title: str
    body: Html
    count: int | None = None  # of what is in it, said in the contents

    @property
    def anchor(self) -> str:
        """Its name in addresses; a title may be a stranger's, so it is not that of anything else on the page."""
        return "in-" + "".join(char if char.isalnum() else "-" for char in self.title.lower())


@dataclass(frozen=True, slots=True)
class Live:
    """A page that a server of ours gives: it asks again and again whether its mark is still that of its address."""

    mark: str
    up: str | None = None  # the address of the list of runs, from here


def part(title: str, *children: str | None, count: int | None = None) -> Part:
    return Part(title, join(*children), count)


def document(
    title: str, header: Html, parts: Sequence[Part | None], footer: Html | None = None, live: Live | None = None
) -> str:
    """The whole page: the header, the contents, the parts in order. live: None for a file."""
    there = [each for each in parts if each is not None]
    sections = [tag("section", tag("h2", each.title), each.body, id=each.anchor) for each in there]
    up = tag("p", tag("a", "All runs", href=live.up), class_="small") if live and live.up else None
    main = tag("main", up, header, _contents(there), *sections, footer, data_mark=live.mark if live else None)
    code = script.PAGE + (script.LIVE if live else "")
    own = "'self'" if live else "'none'"  # what a served page may ask, and where its form may go
    policy = f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(code)}; base-uri 'none'"
    policy += f"; form-action {own}" + (f"; connect-src {own}" if live else "")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title}{_TITLE}"),
        tag("style", Html(STYLE)),
    )
    body = tag("body", main, tag("script", Html(code)))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _contents(parts: Sequence[Part]) -> Html | None:
    if len(parts) < 2:
        return None
    counts = [None if each.count is None else f" ({each.count:,})" for each in parts]
    links = [
        tag("li", tag("a", each.title, count, href=f"#{each.anchor}"))
        for each, count in zip(parts, counts, strict=True)
    ]
    return tag("nav", tag("ol", *links), aria_label="Contents")


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


def notes(sentences: Sequence[str]) -> Html:
    """What a reader must know before believing the numbers."""
    return tag("ul", *(tag("li", sentence) for sentence in sentences), class_="notes")


def small(text: str) -> Html:
    return tag("p", text, class_="quiet small")


def table(head: Sequence[str | None], rows: Sequence[Sequence[str]]) -> Html:
    """Scrolls sideways where it does not fit, by finger and by the arrow keys; its edges show that there is more."""
    titles = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in head)))
    cells = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", titles, tag("tbody", *cells)), class_="scroll")
