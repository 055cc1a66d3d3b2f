"""HTML and SVG by construction: a plain `str` is always escaped, only `Html` passes. Model text is hostile.

tag("p", "1 < 2 ", tag("b", "indeed"), class_="note")    ->    <p class="note">1 &lt; 2 <b>indeed</b></p>
"""

from __future__ import annotations

import html
import re

# Control characters are shown as their pictures (U+2400 ...): they are invalid in XML and invisible in HTML. Tab and
# newline stay.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
_CONTROL |= {code: f"[U+{code:04X}]" for code in range(0x80, 0xA0)}  # terminals take some as commands too
# What is not seen, or turns the order of what is seen round, is named. These are the characters that Unicode lets a
# reader ignore (Default_Ignorable_Code_Point), other marks without a form, line breaks that are none in a terminal, and
# blanks that pass for letters.
_UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Joiners between letters of scripts that need them, and the one that makes a sign a coloured picture, stay.
_LETTER = f"[^\\x00-\u02ff{_UNSEEN}]"
_KEPT = f"(?<={_LETTER})\ufe0f?[\u200c\u200d](?={_LETTER})|(?<={_LETTER})\ufe0f|(?<=[0-9#*])\ufe0f(?=\u20e3)"
_NAMED = re.compile(f"{_KEPT}|([{_UNSEEN}])")
_SURROGATE = re.compile("[\ud800-\udfff\ufffe\uffff]")  # cannot be written as UTF-8 or XML
_ANY = re.compile(f"[{''.join(map(re.escape, map(chr, _CONTROL)))}{_UNSEEN}\ud800-\udfff\ufffe\uffff]")


VOID = ("meta", "input")  # elements that are never closed


class Html(str):
    """Text that is markup already. Made by `tag` and `join` only."""

    __slots__ = ()


def printable(text: str) -> str:
    """Without what could command a terminal, break XML, hide, or turn letters' order round: it is shown instead."""
    if not _ANY.search(text):
        return text
    return _SURROGATE.sub("\ufffd", _NAMED.sub(_name, text)).translate(_CONTROL)


def _name(found: re.Match[str]) -> str:
    return f"[U+{ord(found[1]):04X}]" if found[1] else found[0]


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
    return Html(f"<{opening}>" if name in VOID else f"<{opening}>{join(*children)}</{name}>")
