"""What an attack is, and the few lines that begin every attack program.

Attacks are bounded, so that a wall that fails costs a test and not the machine: no loop without an end but endless CPU,
no file over 64 MB, no more than 20 processes, no signal but harmless ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdkit.tasks.sandbox import End, Limits, Process, script

# Filled in by the driver: paths, pids and ports of what must stay out of reach, and words that must stay unknown.
PLACES = ("SECRET_FILE", "WRITABLE", "TRAINER", "VICTIM", "TCP_PORT", "TCP6_PORT", "UDP_PORT", "UNIX_PATH", "ABSTRACT")
FAST = Limits(cpu_s=0.1, wall_s=15.0, memory_mb=64, output_bytes=1 << 20)
ROOMY = Limits(cpu_s=3.0, wall_s=30.0, memory_mb=128, output_bytes=1 << 20)

PRELUDE = '''
import ctypes, errno, mmap, os, select, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def harm(what):
    os.write(2, ("HARM: " + str(what) + "\\n").encode())

def attempt(what, function, *arguments):
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:
        return None
    harm(f"{what} -> {result!r}")
    return result

def system_call(number, *arguments):
    """Raises OSError like the functions of os."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def never_reaches_the_kernel(calls):
    """Calls with senseless arguments: the filter's own answers are the only ones allowed."""
    for name, number in calls.items():
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
        if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            harm(f"{name} -> {result}, {errno.errorcode.get(ctypes.get_errno())}")
'''


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Held if no process says HARM, no secret word appears in an output, and `complaint` (of the ends) is None."""

    name: str
    source: str
    limits: Limits = ROOMY
    reasons: Sequence[str] = ()  # how it must have ended; empty: any way
    complaint: Callable[[tuple[End, ...]], str | None] = field(default=lambda ends: None)
    processes: Callable[[str], tuple[Process, ...]] = field(default=lambda source: script(source, b"an input line\n"))

    def complete(self, places: dict[str, Any]) -> str:
        source = PRELUDE + self.source
        for name, value in places.items():
            source = source.replace(f"@{name}@", str(value))
        assert not re.search("@[A-Z0-9_]+@", source), f"{self.name}: an unknown place"
        return source
