"""The program inside a model's answer: the last fenced block that is one."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What is shown beside a program: its output, how to start it, its data. Not a program, whatever its place.
_OTHER_TAGS = frozenset(
    {"text", "txt", "plaintext", "plain", "output", "out", "stdout", "stderr", "stdin", "input", "console", "terminal"}
    | {"bash", "sh", "shell", "zsh", "json", "yaml", "toml", "xml", "html", "css", "csv", "markdown", "md", "diff"}
    | {"latex", "tex", "math", "mermaid", "log", "traceback", "pseudocode", "none", "example"}
)
_PYTHON_TAGS = frozenset({"python", "py", "python3", "py3", "python2", "pycon", "ipython"})
_OPENING = re.compile(r"^(?P<indent>[ \t>*\-0-9.)]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
_OPENING_IN_TEXT = re.compile(r"^[^`]*[^`\s](?P<indent>[ \t]+)(?P<fence>`{3,})(?P<info>[A-Za-z0-9]+)[ \t]*$")


@dataclass(frozen=True, slots=True)
class _Block:
    tag: str
    text: str


def extract_program(answer: str) -> str | None:
    """The last complete block tagged as Python; without one, the last complete block whose tag is not another thing's.

    Without fence and common indentation, stripped. None if there is no such block: an unclosed fence was cut off.
    """
    blocks = [block for block in _closed_blocks(answer)[0] if block.text]
    python = [block for block in blocks if block.tag in _PYTHON_TAGS]
    programs = python or [block for block in blocks if block.tag not in _OTHER_TAGS]
    return programs[-1].text if programs else None


def is_cut_off(answer: str) -> bool:
    """Whether the answer ends inside a fenced block."""
    return _closed_blocks(answer)[1]


def _closed_blocks(answer: str) -> tuple[list[_Block], bool]:
    """All complete blocks, and whether one is left open at the end."""
    blocks: list[_Block] = []
    fence, tag, lines = "", "", list[str]()
    for line in answer.replace("\r\n", "\n").split("\n"):
        stripped = line.strip()
        if not fence:
            opening = _OPENING.match(line) or _OPENING_IN_TEXT.match(line)
            if opening:
                fence, tag, lines = _begin(opening)
        elif _closes(stripped, fence):
            blocks.append(_Block(tag, _without_indentation(lines)))
            fence = ""
        elif stripped.endswith(fence) and not stripped.startswith(fence[0]) and fence[0] == "`":
            lines.append(line.rstrip()[: -len(fence)])  # ``` right behind the last statement
            blocks.append(_Block(tag, _without_indentation(lines)))
            fence = ""
        elif (again := _OPENING.match(line)) and again["info"].strip():
            fence, tag, lines = _begin(again)  # the one before was never closed
        else:
            lines.append(line)
    return blocks, bool(fence)


def _begin(opening: re.Match[str]) -> tuple[str, str, list[str]]:
    words = opening["info"].strip().strip("{}").split()
    return opening["fence"], words[0].strip(".").lower() if words else "", []


def _closes(stripped: str, fence: str) -> bool:
    return len(stripped) >= len(fence) and set(stripped) == {fence[0]}


def _without_indentation(lines: list[str]) -> str:
    """Removes the indentation that all lines share; a block that has none keeps every character."""
    margins = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    margin = min(margins, default=0)
    return "\n".join(line[margin:] if line.strip() or margin == 0 else "" for line in lines).strip()
