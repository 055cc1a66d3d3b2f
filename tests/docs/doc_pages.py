"""What the pages of docs/ and the README tell their reader to type.

A block is fenced, or indented by four spaces. One with a line that begins with a program of ours is of commands; what
it takes stands in it as comments, for the reader and for `make test-docs`:

    # needs: TEACHER, runs/math      what the reader puts there; a tiny one stands in where STAND_INS has it
    # takes: 15 minutes              of one core
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted({*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")})
PROGRAMS = ("opdkit", "make", "python")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?:    .*\n+)+")
_ASSIGNMENT = re.compile(r'([A-Z]\w*)=("?)(.*)\2')
_TOML = re.compile(r"(\[[\w.\[\]]+\]|[\w.]+ = [\"'\[{\dtf])")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    line: int
    language: str  # of a fence; "" for none
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def kind(self) -> str:
        """commands, toml, python or text."""
        lines = [line for line in self.text.splitlines() if line and not line.startswith("#")]
        if any(line.split()[0] in PROGRAMS for line in lines if line.split()):
            return "commands"
        if self.language:
            return self.language
        return "toml" if lines and _TOML.match(lines[0]) else "text"

    @property
    def file_name(self) -> str | None:
        """Of a block whose first line says which file it is; in the current folder."""
        named = re.match(r"# (\w+\.py)\n", self.text)
        return named[1] if named else None

    def _said(self, what: str) -> list[str]:
        return re.findall(rf"^# {what}: (.*)$", self.text, re.MULTILINE)

    @property
    def needs(self) -> list[str]:
        return [name.strip() for line in self._said("needs") for name in line.split(",")]

    @property
    def minutes(self) -> int:
        return sum(int(line.split()[0]) for line in self._said("takes"))

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments, variables filled in, up to a pipe."""
        found, variables = [], dict[str, str]()
        for line in self.text.replace("\\\n", " ").splitlines():
            if assigned := _ASSIGNMENT.fullmatch(line.strip()):
                variables[assigned[1]] = assigned[3]
                continue
            words = shlex.split(Template(line).safe_substitute(variables), comments=True)
            if words:
                found.append(words[: words.index("|")] if "|" in words else words)
        return found


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        found.append(Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2]))
    rest = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for match in _INDENTED.finditer(rest):
        line = rest.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, "", textwrap.dedent(match[0]).strip("\n") + "\n"))
    return sorted(found, key=lambda block: block.line)


def inline(page: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of everything between backticks in the page's prose."""
    text = page.read_text(encoding="utf-8")
    rest = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    rest = _INDENTED.sub(lambda block: "\n" * block[0].count("\n"), rest)
    for match in _INLINE.finditer(rest):
        yield f"{page.relative_to(ROOT)}:{rest.count(chr(10), 0, match.start()) + 1}", " ".join(match[1].split())
