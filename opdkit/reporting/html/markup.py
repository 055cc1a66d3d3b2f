"""HTML and SVG by construction: a plain `str` is always escaped, only `Html` passes. Model text is hostile.

tag("p", "1 < 2 ", tag("b", "indeed"), class_="note")    ->    <p class="note">1 &lt; 2 <b>indeed</b></p>
"""

from __future__ import annotations

import html
import re

# Control characters are shown as their pictures (U+2400 ...): they are invalid in XML and invisible in HTML. Tab and
# newline stay. Bidirectional overrides could show a text in another order than it has.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
_CONTROL |= {code: f"[U+{code:04X}]" for code in range(0x80, 0xA0)}  # terminals take some as commands too
_BIDI = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_UNPRINTABLE = str.maketrans({**_CONTROL, **_BIDI})
_SURROGATE = re.compile("[\ud800-\udfff\ufffe\uffff]")  # cannot be written as UTF-8 or XML


class Html(str):
    """Text that is markup already. Made by `tag` and `join` only."""

    __slots__ = ()


def printable(text: str) -> str:
    """Without what could command a terminal, break XML or turn the order of the letters round: it is shown instead."""
    return _SURROGATE.sub("\ufffd", text.translate(_UNPRINTABLE))


def escape(text: str) -> Html:
    return Html(html.escape(printable(text)))


def join(*children: str | None) -> Html:
    """Children one after the other; None is left out."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """One element. `text_anchor` becomes `text-anchor`, `class_` becomes `class`; attributes of None are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = " ".join(words)
    return Html(f"<{opening}>" if name == "meta" else f"<{opening}>{join(*children)}</{name}>")
