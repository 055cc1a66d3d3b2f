"""What a check says. One that raises has failed; what could not be looked at is said, and is no pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["passed", "warned", "failed", "not checked"]
LEVELS: tuple[Level, ...] = ("failed", "warned", "not checked", "passed")  # as they are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """sentence: what was found, with its numbers; fix: what to do; details: lines below it."""

    level: Level
    sentence: str
    fix: str = ""
    details: tuple[str, ...] = ()


def passed(sentence: str, details: Sequence[str] = ()) -> Finding:
    return Finding(level="passed", sentence=sentence, details=tuple(details))


def warned(sentence: str, fix: str, details: Sequence[str] = ()) -> Finding:
    return Finding(level="warned", sentence=sentence, fix=fix, details=tuple(details))


def failed(sentence: str, fix: str, details: Sequence[str] = ()) -> Finding:
    return Finding(level="failed", sentence=sentence, fix=fix, details=tuple(details))


def not_checked(why: str, fix: str = "") -> Finding:
    return Finding(level="not checked", sentence=why, fix=fix)


class Unavailable(Exception):
    """What a check looks at could not be made; the check that met it first has said why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A check's name, what it found, and the seconds that took (with what it was the first to need)."""

    name: str
    finding: Finding
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {"check": self.name, "seconds": self.seconds, **asdict(self.finding)}
