"""Text from files, models and command lines, made safe to look at."""

from __future__ import annotations

import unicodedata


def printable(text: str, *, keep: str = "") -> str:
    r"""What cannot be seen is shown as Python would write it: `\x1b`, `\u202e`, `\n`. Nothing is dropped.

    That is all that is neither printed nor a space: control characters, which a terminal obeys; marks that turn the
    order of letters round or have no width; halves of surrogate pairs, as of file names that are not UTF-8; and what
    Unicode has not assigned. The characters in `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep or _is_seen(char) else _escaped(char) for char in text)


def _is_seen(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # spaces of other widths than " "


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
