r"""Where the final answer is in a text, and where brackets open and close. In linear time: the text is hostile."""

from __future__ import annotations

import re

# "\\boxed" with doubled backslashes is what a model writes inside JSON; an escaped brace is no brace.
_BOX_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)(?![A-Za-z])\s*|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)(?![A-Za-z])")
# What may follow a brace-less \boxed. Prose ("put it in \boxed form") must not count.
_BARE_BOX = re.compile(r"\$?(?:[-+]?[0-9.\\]|[A-Za-z](?=[\s.,;:$)]|$))")
_ANSWER_LINE = re.compile(r"\banswer\**[ \t]*:\**\s*([^\n]*)", re.IGNORECASE)
_OPENING, _CLOSING = "([{", ")]}"


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete box (of nested boxes the innermost), stripped; None if there is none.

    `\boxed{..}`, `\boxed {..}`, `\fbox{..}` and the brace-less `\boxed 7` count; a box that never closes does
    not. "": an empty box.
    """
    open_braces: list[int | None] = []  # where the content starts, if the brace opens a box
    last: tuple[int, str] | None = None
    first = _BOX.search(text)
    position = first.start() if first else len(text)  # braces before the first box close nothing of ours
    while (token := _BOX_TOKEN.search(text, position)) is not None:
        position = token.end()
        if token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, text[start : token.start()])
        elif "box" in token.group():
            if text.startswith("{", position):
                position += 1
                open_braces.append(position)
            elif _BARE_BOX.match(text, position):
                last = (position, _bare_argument(text, position))
    return None if last is None else last[1].strip()


def answer_line(text: str) -> str | None:
    """What follows the last "Answer:" up to the end of its line (of the next one, if the colon ends the line)."""
    matches = _ANSWER_LINE.findall(text)
    line = matches[-1].strip().strip("*").strip() if matches else ""
    if "\\boxed" in line:
        return last_boxed(line)
    return line or None


def nesting(text: str) -> int:
    """How deep brackets of any kind nest."""
    return max(_depths(text), default=0)


def enclosed(text: str) -> bool:
    """Whether the first character is a bracket that closes at the last character."""
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return False
    return all(depth > 0 for depth in _depths(text)[1:-1])


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """Splits at the separators that are outside of all brackets; the pieces are stripped."""
    depths = _depths(text)
    pieces, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    return [*pieces, text[start:].strip()]


def _depths(text: str) -> list[int]:
    """For every character, how many brackets are open around it; the brackets themselves count as outside. Kinds may
    mix, since [0,1) is an interval."""
    depths, depth = [], 0
    for character in text:
        if character in _CLOSING:
            depth = max(0, depth - 1)
        depths.append(depth)
        if character in _OPENING:
            depth += 1
    return depths


def _bare_argument(text: str, start: int) -> str:
    depth, end = 0, start
    while end < len(text):
        character = text[end]
        if depth == 0 and (character.isspace() or character == "}" or (character == "$" and end > start)):
            break
        depth += (character == "{") - (character == "}")
        end += 1
    return text[start:end]
