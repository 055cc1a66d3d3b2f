"""Makes this process look as if it ran elsewhere, before it starts a sandbox. Needs root."""

from __future__ import annotations

import ctypes
import errno
import struct

from opdkit.tasks.sandbox import linux

_DOCKER_CAPABILITIES = 0xA80425FB  # the fourteen that Docker leaves to root
_PR_CAPBSET_DROP = 24
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _ENOSYS = 0x7FFF0000, 0x00050000, errno.ENOSYS
_CLONE, _CLONE3 = 56, 435
# unshare, setns, mount, umount2, pivot_root, open_tree, move_mount, fsopen, fsmount, mount_setattr
_DENIED = (272, 308, 165, 166, 155, 428, 429, 430, 432, 442)


def docker() -> None:
    """Docker's default: its capabilities, and of its seccomp profile what concerns namespaces and mounts."""
    _install(_denying(_DENIED) + _denying_namespaces_of_clone())
    for capability in range(41):
        if not _DOCKER_CAPABILITIES >> capability & 1:
            linux._check("capbset", linux._libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low = _DOCKER_CAPABILITIES
    data = (ctypes.c_uint32 * 6)(low, low, 0, 0, 0, 0)  # effective, permitted, inheritable; low and high words
    linux._syscall("capset", 126, header, data)


def without_seccomp() -> None:
    """A kernel without seccomp filters."""
    _install([(_EQUAL, 0, 1, 317), (_RETURN, 0, 0, _ERRNO | errno.EINVAL)])


def _denying(numbers: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    return [part for number in numbers for part in ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM))]


def _denying_namespaces_of_clone() -> list[tuple[int, int, int, int]]:
    return [
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_EQUAL, 0, 4, _CLONE),
        (_LOAD, 0, 0, 16),  # its flags
        (_SET, 0, 1, 0x7E020000),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _install(rules: list[tuple[int, int, int, int]]) -> None:
    program = [(_LOAD, 0, 0, 0), *rules, (_RETURN, 0, 0, _ALLOW)]
    linux.install_seccomp(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
