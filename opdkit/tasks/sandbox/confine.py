"""What a freshly forked process does to itself before it compiles the program it was forked for. None of it can be
undone. The order matters: identity first (it clears PDEATHSIG), Landlock needs no_new_privs, seccomp forbids the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.tasks.sandbox import linux, seccomp

MIB = 1 << 20
MAX_THREADS = 64
_THREAD_STACK_BYTES = 16 * MIB  # else every thread would reserve as much as boot.py gives the main one
_SLACK_BYTES = 640 * MIB  # address space: programs ask for threading.stack_size(512 MB) and use little of it
_MAX_DESCRIPTORS = 64
_OUT_OF_THE_WAY = 40  # descriptors are parked from here on while 0, 1, 2, ... are being filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Walls:
    """What the chosen tier gives to every process."""

    tier: str
    proc: int  # descriptor of /proc, in which the zygote watches its processes
    first_uid: int | None  # process number i is user first_uid + i; None: all are the zygote's user
    landlock_abi: int
    landlock_ruleset: int | None
    seccomp_template: bytes | None  # None: allow_unsafe


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What an idle process forked from the zygote uses; programs are measured beyond it."""

    address_space_bytes: int
    resident_bytes: int

    @classmethod
    def measure(cls, proc: int) -> Size:
        with os.fdopen(os.open("self/statm", os.O_RDONLY, dir_fd=proc)) as statm:
            total, resident, *_ = (int(pages) * resource.getpagesize() for pages in statm.read().split())
        return cls(address_space_bytes=total, resident_bytes=resident)


def confine(
    walls: Walls, size: Size, limits: Mapping[str, Any], *, number: int, ruleset: int | None, zygote: int
) -> None:
    """number: which of the zygote's processes this is. The descriptors have been arranged already."""
    threading.stack_size(_THREAD_STACK_BYTES)
    set_limits(limits, size, exact_num_tasks=walls.first_uid is not None)
    become_nobody(walls, number, zygote)
    if ruleset is not None:
        linux.landlock_restrict_self(ruleset)
        os.close(ruleset)
    if walls.seccomp_template is not None:
        linux.install_seccomp(seccomp.for_process(walls.seccomp_template, os.getpid()))


def arrange_descriptors(kept: Sequence[int], ready: int, ruleset: int | None) -> tuple[int, int | None]:
    """Makes kept[i] descriptor i, moves the other two behind them, closes the rest. Returns where the two are now."""
    wanted = [*kept, ready, *([] if ruleset is None else [ruleset])]
    # First out of the way, so that filling a place never overwrites a descriptor that is still wanted.
    parked = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for descriptor in wanted]
    for place, descriptor in enumerate(parked):
        os.dup2(descriptor, place, inheritable=False)
    os.closerange(len(wanted), os.sysconf("SC_OPEN_MAX"))
    return len(kept), None if ruleset is None else len(kept) + 1


def set_limits(limits: Mapping[str, Any], size: Size, *, exact_num_tasks: bool) -> None:
    memory = size.address_space_bytes + limits["memory_mb"] * MIB + _SLACK_BYTES
    cpu_s = math.ceil(limits["cpu_s"]) + 1  # the zygote ends it at cpu_s; this is for a zygote that is gone
    for name, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    optional = [(resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0)]
    if exact_num_tasks:  # it counts all tasks of a user: right only if the user is this process alone
        optional.append((resource.RLIMIT_NPROC, MAX_THREADS))
    for name, value in optional:
        with contextlib.suppress(ValueError, OSError):  # emulated kernels lack some; seccomp forbids what they bound
            resource.setrlimit(name, (value, value))


def become_nobody(walls: Walls, number: int, zygote: int) -> None:
    if walls.first_uid is not None:
        switch_user(walls.first_uid + number)
    linux.drop_capabilities()
    linux.die_with_parent(signal.SIGKILL)
    if os.getppid() != zygote:  # it died before the line above
        os._exit(1)
    linux.hide_from_tracers()
    linux.forbid_new_privileges()


def switch_user(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
