"""What is run and what became of it: the words shared by the trainer's side and the zygote's. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

TIERS = ("namespaces", "chroot", "landlock", "seccomp")  # strongest first; see tiers.py
UNSAFE = "none"

# exit: by itself, a signal of its own included. stopped: the process it was paired with had ended.
Reason = Literal["exit", "cpu", "wall", "memory", "threads", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a job: its processes together have cpu_s and memory_mb, and each the same wall time and its own outputs.

    memory_mb counts beyond an idle interpreter with everything imported."""

    cpu_s: float = 6.0
    wall_s: float | None = None  # None: 2 * cpu_s + 2, for programs that sleep or wait
    memory_mb: int = 1024
    output_bytes: int = 16 << 20  # of standard output, and of standard error

    def as_message(self) -> dict[str, Any]:
        return {**asdict(self), "wall_s": 2 * self.cpu_s + 2 if self.wall_s is None else self.wall_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    task: Mapping[str, Any]  # see child.py
    stdin: bytes = b""
    is_linked: bool = False  # alone in its job, and the trainer holds the other end of its link (`session.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One process, or two that are linked; when the first ends, the second is stopped. `tag` is the caller's own."""

    processes: tuple[Process, ...]
    limits: Limits = field(default_factory=Limits)
    tag: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How one process ended and what it had written. Everything but `stdout` and `stderr` was seen from outside."""

    reason: Reason
    code: int  # exit status; -n: ended by signal n
    cpu_s: float
    wall_s: float
    peak_mb: float  # largest resident memory, beyond an idle interpreter
    stdout: bytes
    stderr: str  # its end
    is_output_full: bool  # standard output reached its limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """error: why the job could not be run (never something a program can bring about); `ends` is empty then."""

    job: Job
    ends: tuple[End, ...] = ()
    error: str | None = None


def script(source: str, stdin: bytes) -> tuple[Process, ...]:
    """A program that reads standard input; what it prints is its answer."""
    return (Process(task={"mode": "script", "source": source}, stdin=stdin),)


def call(source: str, entry_point: str, args: Sequence[Any]) -> tuple[Process, ...]:
    """One call of a function or of a method of `class Solution`; standard output is the result as JSON.

    args: JSON values.
    """
    return (Process(task={"mode": "call", "source": source, "entry_point": entry_point, "args": list(args)}),)


def cells() -> tuple[Process, ...]:
    """An interpreter that runs one piece of a program after the other, as the trainer sends them."""
    return (Process(task={"mode": "cells"}, is_linked=True),)


def with_tests(source: str, entry_point: str, *, starter: str, tests: str) -> tuple[Process, ...]:
    """A test program that calls the function, in a process of its own, which sees nothing of the program but results.

    starter: code both sides begin with (definitions the tests or the program rely on). The first process's standard
    output is {"verdict": "pass" | "wrong" | "runtime_error" | "gone" | "broken_test", "detail": ..., "call": ...}.
    """
    common = {"entry_point": entry_point, "starter": starter}
    return (
        Process(task={"mode": "judge", "source": tests, **common}),
        Process(task={"mode": "serve", "source": source, **common}),
    )
