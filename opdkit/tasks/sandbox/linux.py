"""The Linux system calls that the standard library lacks, through ctypes. Numbers are x86-64; see seccomp.py.

Every function raises OSError whose text names the call. Imported by the zygote only, never by the trainer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

# linux/sched.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
# sys/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 0x4000, 0x40000
_MNT_DETACH = 2
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
# linux/seccomp.h
_SECCOMP_SET_MODE_FILTER = 1
# linux/landlock.h
_LANDLOCK_CREATE_RULESET_VERSION = 1
_CAPABILITY_VERSION_3 = 0x20080522

_SYS_PIVOT_ROOT, _SYS_SECCOMP = 155, 317
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_RESTRICT_SELF = 444, 446

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


# Made once: to make a ctypes class costs as much as ten system calls.
class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each


def unshare(flags: int) -> None:
    _check("unshare", _libc.unshare(flags))


def mount(kind: str, target: str, flags: int, options: str = "") -> None:
    """kind: a file system type, or "none" to change flags only."""
    name = None if kind == "none" else kind.encode()
    _check(
        f"mount {kind} on {target}",
        _libc.mount(kind.encode(), target.encode(), name, ctypes.c_ulong(flags), options.encode()),
    )


def detach(target: str) -> None:
    """Takes a mount out of the tree; whoever holds a descriptor of it may go on using it."""
    _check(f"umount2 {target}", _libc.umount2(target.encode(), _MNT_DETACH))


def pivot_root_here() -> None:
    """Makes the current folder, a mount point, the root, and lets the old root go."""
    _syscall("pivot_root", _SYS_PIVOT_ROOT, b".", b".")
    detach(".")


def die_with_parent(signal_number: int) -> None:
    """Cleared by the kernel at every change of user id or capabilities: call it after those."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal_number)


def hide_from_tracers() -> None:
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    _check("capset", _libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES))


def install_seccomp(program: bytes) -> None:
    """program: struct sock_filter[], 8 bytes each. Irrevocable, and inherited by every thread made later."""
    fprog = _SockFprog(len(program) // 8, program)
    _syscall("seccomp", _SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(fprog))


def landlock_abi() -> int:
    """0: not in this kernel, switched off at boot, or forbidden to us."""
    try:
        return _syscall("landlock", _SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def landlock_ruleset(handled: Sequence[int]) -> int:
    """A descriptor of a rule set without rules: all that is handled is denied.

    handled: 64-bit masks of struct landlock_ruleset_attr; as many as this kernel's ABI knows.
    """
    attributes = (ctypes.c_uint64 * len(handled))(*handled)
    return _syscall("landlock_create_ruleset", _SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.sizeof(attributes), 0)


def landlock_restrict_self(ruleset: int) -> None:
    _syscall("landlock_restrict_self", _SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)


def _syscall(name: str, number: int, *arguments: object) -> int:
    # A bare int would be passed as 32 bits, and leave the upper half of the register to chance.
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(name, _libc.syscall(ctypes.c_long(number), *wide))


def _prctl(name: str, option: int, value: int) -> None:
    _check(f"prctl({name})", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _check(name: str, result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(f"{name}: {os.strerror(number)}")
    return int(result)
