"""The seccomp filter, instruction by instruction, in an interpreter of BPF written for this test."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from opdkit.tasks.sandbox import seccomp

pytestmark = pytest.mark.skipif(platform.machine() not in seccomp.ARCHITECTURES, reason="the filter is for x86-64")

OWN, OTHER = 4321, 77
X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
ALLOW, KILL = "allow", "kill"


def decide(number: int, *arguments: int, architecture: int = X86_64) -> str | int:
    """ALLOW, KILL, or the error number."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(list(arguments) + [0] * 6)[:6])
    program = list(struct.iter_unpack("=HBBI", seccomp.for_process(seccomp.template(), OWN)))
    accumulator, position = 0, 0
    while True:
        code, jump_true, jump_false, k = program[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code in (0x15, 0x35):
            holds = accumulator == k if code == 0x15 else accumulator >= k
            position += jump_true if holds else jump_false
        else:
            assert code == 0x06
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(k & 0xFFFF0000, k & 0xFFFF)


def test_every_number_has_the_answer_of_its_table() -> None:
    """All numbers from 0 to 1000, without arguments: the tables' own are allowed, all others are not."""
    allowed = {number for group in seccomp._ALLOWED.values() for number in group.values()}
    by_argument = {9, 16, 44, 53, 56, 62, 72, 157, 234, 262, 302}
    for number in set(range(1001)) - by_argument:
        expected: str | int = errno.EPERM
        if number in allowed:
            expected = ALLOW
        elif number in seccomp._PATHS.values():
            expected = errno.EACCES
        elif number in seccomp._MISSING.values():
            expected = errno.ENOSYS
        assert decide(number) == expected, number


def test_what_must_never_be_allowed() -> None:
    """By number from the kernel's table, written down independently of the filter's: opening, executing, forking,
    connecting, tracing, mounting, loading."""
    for number in (2, 257, 437, 59, 322, 57, 58, 435, 41, 42, 49, 46, 47, 101, 165, 272, 308, 321, 323, 425, 319, 310):
        assert decide(number) not in (ALLOW, KILL), number


def test_other_architectures_and_x32() -> None:
    """32-bit and foreign calls kill; x32 numbers do not exist, also not as a number with the top bit."""
    for architecture in (I386, AARCH64, 0):
        assert decide(0, architecture=architecture) == KILL
    for number in (0x40000000, 0x40000001, 0x40000200, 0xFFFFFFFF, 0x80000000):
        assert decide(number) == errno.ENOSYS


def test_signals_and_limits_reach_oneself_only() -> None:
    """The kernel reads pids as 32 bits, so an upper half changes nothing."""
    for number in (62, 234):
        assert decide(number, OWN, 9) == ALLOW
        for pid in (OTHER, 0, 1, 0xFFFFFFFF, OWN + 1):
            assert decide(number, pid, 9) == errno.EPERM
    assert decide(62, (1 << 32) | OTHER) == errno.EPERM
    assert decide(302, 0) == decide(302, OWN) == ALLOW
    assert decide(302, OTHER) == errno.EPERM


def test_threads_but_no_processes() -> None:
    """clone needs all five flags of a thread and none of a namespace."""
    thread = 0x3D0F00  # what glibc passes
    assert decide(56, thread) == ALLOW
    for missing in (0x100, 0x200, 0x400, 0x800, 0x10000):
        assert decide(56, thread & ~missing) == errno.EPERM
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert decide(56, thread | namespace) == errno.EPERM
    assert decide(56, 17) == errno.EPERM


def test_calls_that_are_allowed_in_part() -> None:
    """Descriptors may be duplicated, not owned; sockets come in unnamed pairs; a file is asked about only if open."""
    assert decide(9, 0, 4096, 3, 0x22) == ALLOW
    assert decide(9, 0, 4096, 3, 0x40022) == errno.EPERM
    assert decide(72, 5, 0) == decide(72, 5, 1030) == ALLOW
    assert decide(72, 5, 8) == decide(72, 5, 10) == decide(72, 5, 15) == decide(72, 5, 1024) == errno.EPERM
    assert decide(16, 0, 0x541B) == ALLOW
    assert decide(16, 0, 0x5401) == decide(16, 0, 0x5412) == errno.ENOTTY
    assert decide(53, 1, 1) == ALLOW
    assert decide(53, 2, 1) == decide(53, 16, 3) == errno.EPERM
    assert decide(44, 4, 0, 1, 0, 0) == ALLOW
    assert decide(44, 4, 0, 1, 0, 0x1000) == decide(44, 4, 0, 1, 0, 1 << 32) == errno.EPERM
    assert decide(157, 15) == ALLOW
    assert decide(157, 4, 1) == decide(157, 22, 2) == decide(157, 1) == errno.EPERM
    assert decide(262, 3, 0, 0, 0x1000) == ALLOW
    assert decide(262, 3, 0, 0, 0) == errno.EACCES


def test_the_filter_is_short() -> None:
    """Under 400 instructions: every process installs it."""
    assert len(seccomp.template()) // 8 < 400
