"""A fixed text: what a teacher knows beside every problem. On-policy context distillation makes the student know it.

`text` in the recipe, or `file`: UTF-8, without the white space around it, read once.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from opdkit.contexts.base import Cut, Reading
from opdkit.contexts.beside import Beside
from opdkit.errors import UserError
from opdkit.types import Group, Rollout


class Text(Beside):
    kind: Literal["text"] = "text"
    text: str | None = None  # what is shown; either this or file
    file: str | None = None  # a UTF-8 file that holds it

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.text is None) == (self.file is None):
            raise ValueError('context.kind = "text" shows context.text or the text of context.file; set one of the two')
        if not (self.file if self.text is None else self.text.strip()):
            raise ValueError('context.kind = "text" has no text to show; write context.text, or name a file')
        return self

    @property
    def reads_file(self) -> str | None:
        return self.file

    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading:
        text = self.text if self.file is None else text_of(self.file)
        assert text is not None
        return self.beside(group.problem, text, cut)


@cache  # a run reads one text, whatever becomes of the file
def text_of(path: str) -> str:
    """Raises UserError for a file that is not there, is not UTF-8 or holds no text."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"context.file = {path[:200]} cannot be read ({reason}); name a file of UTF-8 text") from None
    if not text:
        raise UserError(f"context.file = {path[:200]} holds no text; write what the teacher is to read")
    return text


def digest_of(path: str) -> str:
    """sha256 of the text of a file, in hexadecimal."""
    return hashlib.sha256(text_of(path).encode()).hexdigest()
