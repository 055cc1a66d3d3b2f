"""The system calls a graded program may make: a seccomp filter in classic BPF, built by hand. Deny by default.

No path can be opened, nothing executed, no process started, no socket made that leads outside, no other process
signalled, traced or limited. What is left: read and write what is open, memory, threads, time, signals to oneself.
Denied calls answer EPERM (paths: EACCES), so Python raises PermissionError and the program may go on.

The filter is a binary search tree over call numbers whose leaves are actions, so the kernel decides in about eight
comparisons. x86-64 only; another architecture word (int 0x80 has one) kills the process, x32 numbers do not exist.
"""

from __future__ import annotations

import errno
import platform
import struct

ARCHITECTURES = ("x86_64",)

Code = list[tuple[int, int, int, int]]  # code, jump if true, jump if false, constant

# linux/bpf_common.h, linux/seccomp.h
_LOAD_WORD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_AUDIT_ARCH_X86_64 = 0xC000003E
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_FIRST_X32 = 0x40000000
_OWN_PID = 0x7EADBEEF  # stands for the pid until `for_process` knows it

# linux/sched.h
_THREAD_FLAGS = 0x00010F00  # CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD: all must be set, so limits are for all threads
_NAMESPACE_FLAGS = 0x7E020080  # every CLONE_NEW*: none may be set
_AT_EMPTY_PATH = 0x1000
_AF_UNIX = 1
_MAP_HUGETLB = 0x40000  # pages that neither RLIMIT_AS nor the resident size counts
_PRCTL_NAMES = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_FCNTL_DESCRIPTORS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_IOCTL_DESCRIPTORS = (0x541B, 0x5421, 0x5450, 0x5451)  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX

_ALLOWED = {
    "descriptors": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "pread64": 17, "pwrite64": 18,
        "readv": 19, "writev": 20, "pipe": 22, "select": 23, "dup": 32, "dup2": 33, "ftruncate": 77, "epoll_wait": 232,
        "epoll_ctl": 233, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
        "dup3": 292, "pipe2": 293, "close_range": 436, "recvfrom": 45, "shutdown": 48, "getsockname": 51,
        "getsockopt": 55,
    },
    "memory": {"mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "mincore": 27, "madvise": 28},
    "threads": {
        "sched_yield": 24, "futex": 202, "sched_getaffinity": 204, "set_tid_address": 218, "set_robust_list": 273,
        "get_robust_list": 274, "getcpu": 309, "membarrier": 324, "rseq": 334,
    },
    "signals": {
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pause": 34, "getitimer": 36, "alarm": 37,
        "setitimer": 38, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
    },
    "time": {
        "nanosleep": 35, "gettimeofday": 96, "times": 100, "time": 201, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "restart_syscall": 219,
    },
    "itself": {
        "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "umask": 95, "getrlimit": 97, "getrusage": 98,
        "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
        "getgroups": 115, "getresuid": 118, "getresgid": 120, "setrlimit": 160, "gettid": 186, "exit_group": 231,
        "getrandom": 318,
    },
}  # fmt: skip
# Calls that name a file: EACCES is what a program on a locked-down machine expects.
_PATHS = {
    "open": 2, "stat": 4, "lstat": 6, "access": 21, "readlink": 89, "openat": 257, "readlinkat": 267,
    "faccessat": 269, "statx": 332, "openat2": 437, "faccessat2": 439,
}  # fmt: skip
# glibc tries these first and falls back when they do not exist.
_MISSING = {"clone3": 435}


def template() -> bytes:
    """The filter without a pid; `for_process` completes it. NotImplementedError on another architecture."""
    if platform.machine() not in ARCHITECTURES:
        raise NotImplementedError(f"the system call filter knows {ARCHITECTURES[0]} only, this is {platform.machine()}")
    program: Code = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD_WORD, 0, 0, _NUMBER),
        *_search(_intervals(_actions())),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def for_process(filter_template: bytes, pid: int) -> bytes:
    """The filter of one process: it may signal and limit `pid`, which is itself, and nobody else."""
    marker = struct.pack("=I", _OWN_PID)
    assert filter_template.count(marker) == 3, "kill, tgkill and prlimit64 name the pid"
    return filter_template.replace(marker, struct.pack("=I", pid))


def _actions() -> dict[int, Code]:
    """Call number -> what to do. Numbers that are not here: EPERM."""
    actions = {number: _allow() for group in _ALLOWED.values() for number in group.values()}
    actions |= {number: _deny(errno.EACCES) for number in _PATHS.values()}
    actions |= {number: _deny(errno.ENOSYS) for number in _MISSING.values()}
    own = _if_argument_in(0, (_OWN_PID,))
    return actions | {
        9: _unless_bits(3, _MAP_HUGETLB),  # mmap
        16: _if_argument_in(1, _IOCTL_DESCRIPTORS, otherwise=errno.ENOTTY),  # ioctl
        44: _if_argument_in(4, (0,), also_upper_half=True),  # sendto: what is connected, without an address
        53: _if_argument_in(0, (_AF_UNIX,)),  # socketpair
        56: _if_thread(),  # clone
        62: own,  # kill
        72: _if_argument_in(1, _FCNTL_DESCRIPTORS),  # fcntl: F_SETOWN and others would send signals
        157: _if_argument_in(0, _PRCTL_NAMES),  # prctl
        234: own,  # tgkill
        262: _if_bits(3, _AT_EMPTY_PATH, otherwise=errno.EACCES),  # newfstatat: glibc's fstat
        302: _if_argument_in(0, (0, _OWN_PID)),  # prlimit64
    }


def _intervals(actions: dict[int, Code]) -> list[tuple[int, Code]]:
    """(first number, action) of each run of equal actions, in order; every 32-bit number is in one."""
    result: list[tuple[int, Code]] = []
    for number in sorted({0, _FIRST_X32} | set(actions) | {number + 1 for number in actions}):
        action = actions.get(number, _deny(errno.EPERM if number < _FIRST_X32 else errno.ENOSYS))
        if not result or result[-1][1] != action:
            result.append((number, action))
    return result


def _search(intervals: list[tuple[int, Code]]) -> Code:
    if len(intervals) == 1:
        return intervals[0][1]
    middle = len(intervals) // 2
    below, above = _search(intervals[:middle]), _search(intervals[middle:])
    assert len(below) < 256, "a conditional jump has eight bits"
    return [(_JUMP_GREATER_EQUAL, len(below), 0, intervals[middle][0]), *below, *above]


def _allow() -> Code:
    return [(_RETURN, 0, 0, _RET_ALLOW)]


def _deny(error: int) -> Code:
    return [(_RETURN, 0, 0, _RET_ERRNO | error)]


def _load_argument(index: int, *, upper_half: bool = False) -> Code:
    return [(_LOAD_WORD, 0, 0, 16 + 8 * index + (4 if upper_half else 0))]


def _if_argument_in(
    index: int, values: tuple[int, ...], *, otherwise: int = errno.EPERM, also_upper_half: bool = False
) -> Code:
    """The kernel reads these arguments as 32-bit numbers, except pointers: for those also the upper half must be 0."""
    code: Code = []
    if also_upper_half:
        code += [*_load_argument(index, upper_half=True), (_JUMP_EQUAL, 1, 0, 0), *_deny(otherwise)]
    code += _load_argument(index)
    for value in values:
        code += [(_JUMP_EQUAL, 0, 1, value), *_allow()]
    return code + _deny(otherwise)


def _if_bits(index: int, bits: int, *, otherwise: int) -> Code:
    return [*_load_argument(index), (_AND, 0, 0, bits), (_JUMP_EQUAL, 0, 1, bits), *_allow(), *_deny(otherwise)]


def _unless_bits(index: int, bits: int) -> Code:
    return [*_load_argument(index), (_AND, 0, 0, bits), (_JUMP_EQUAL, 0, 1, 0), *_allow(), *_deny(errno.EPERM)]


def _if_thread() -> Code:
    return [
        *_load_argument(0),
        (_AND, 0, 0, _NAMESPACE_FLAGS),
        (_JUMP_EQUAL, 1, 0, 0),
        *_deny(errno.EPERM),
        *_if_bits(0, _THREAD_FLAGS, otherwise=errno.EPERM),
    ]
