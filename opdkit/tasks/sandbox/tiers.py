"""The outer walls, strongest first. Each is tried in a throw-away process and believed only if it holds there.

    namespaces   an empty read-only root, no network, own pids and IPC      CAP_SYS_ADMIN, or user namespaces that mount
    chroot       an empty root that no longer exists on disk                root with CAP_SYS_CHROOT and CAP_SETUID
    landlock     no file opens, even if the filter had a hole               Linux 5.13, any user
    seccomp      the filter alone, which is also the floor of all others    any Linux with seccomp filters

Landlock is added to the two above it wherever the kernel has it, and a user id per process wherever ids can be changed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import tempfile
import traceback
from collections.abc import Callable, Collection
from typing import NoReturn

from opdkit.tasks.sandbox import linux, seccomp
from opdkit.tasks.sandbox.confine import Walls, become_nobody, switch_user
from opdkit.tasks.sandbox.jobs import TIERS, UNSAFE

_USER_IDS = range(61184, 65520)  # no distribution hands these out to people; systemd uses them for transient services
_PROBE_TIMEOUT_S = 20.0
_HANDLED_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by ABI: all that it knows
_HANDLED_NETWORK, _SCOPED = 3, 3  # bind and connect of TCP (ABI 4); abstract sockets and signals (ABI 6)


def draw_user_ids(num_processes: int) -> int:
    """The first of as many ids. Two zygotes that draw the same only share their count of threads: a likely miss is
    enough."""
    return _USER_IDS[os.getpid() * num_processes % (len(_USER_IDS) - num_processes)]


def strongest(allowed: Collection[str], parent: int, first_uid: int) -> tuple[Walls | None, dict[str, str]]:
    """Enters the strongest allowed tier that holds, and tells why the stronger ones were refused. Irrevocable.

    parent: a pidfd; when that process ends, so does this one. first_uid: see Walls; used if ids can be changed here.
    None: no tier holds. A `namespaces` zygote returns in a new process, and the old one waits for its end.
    """
    refused: dict[str, str] = {}
    for tier in TIERS:
        reason = _probe(tier, first_uid) if tier in allowed else "not among the allowed tiers"
        if reason is None:
            return enter(tier, parent, first_uid), refused
        refused[tier] = reason
    return None, refused


def enter(tier: str, parent: int, first_uid: int) -> Walls:
    if tier == UNSAFE:
        return Walls(
            tier=UNSAFE,
            proc=_open_proc("/proc"),
            first_uid=None,
            landlock_abi=0,
            landlock_ruleset=None,
            seccomp_template=None,
        )
    template = seccomp.template()
    abi = linux.landlock_abi() if tier != "seccomp" else 0
    if tier == "landlock" and abi == 0:
        raise OSError("Landlock is not in this kernel (Linux 5.13 has it), is switched off, or is forbidden here")
    if tier == "namespaces":
        proc = _enter_namespaces(parent)
    elif tier == "chroot":
        proc = _enter_empty_folder()
    else:
        proc = _open_proc("/proc")
    os.chdir("/")
    can_switch = _in_throw_away_process(lambda: switch_user(first_uid)) is None
    if tier == "chroot" and not can_switch:
        raise OSError("the user id cannot be changed here, and root could leave the empty folder")
    return Walls(
        tier=tier,
        proc=proc,
        first_uid=first_uid if can_switch else None,
        landlock_abi=abi,
        landlock_ruleset=_landlock_ruleset(abi) if abi else None,
        seccomp_template=template,
    )


def _probe(tier: str, first_uid: int) -> str | None:
    """None if the tier holds in a throw-away process, else why not."""

    def try_it() -> None:
        walls = enter(tier, os.pidfd_open(os.getppid()), first_uid)
        if tier in ("namespaces", "chroot") and os.listdir("/"):
            raise OSError("the new root is not empty")
        become_nobody(walls, 0, os.getppid())
        if tier in ("namespaces", "chroot"):
            _require_refused("/a", os.O_CREAT | os.O_WRONLY)
        if walls.landlock_ruleset is not None:
            linux.landlock_restrict_self(walls.landlock_ruleset)
            _require_refused("/", os.O_RDONLY)
        assert walls.seccomp_template is not None
        linux.install_seccomp(seccomp.for_process(walls.seccomp_template, os.getpid()))
        _require_refused("/", os.O_RDONLY)

    return _in_throw_away_process(try_it)


def _in_throw_away_process(try_it: Callable[[], None]) -> str | None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            try_it()
            os.write(writing, b"held")
        except (OSError, NotImplementedError, ValueError) as error:
            os.write(writing, str(error).encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        os._exit(0)
    os.close(writing)
    said = b""
    while select.select([reading], [], [], _PROBE_TIMEOUT_S)[0]:
        data = os.read(reading, 65536)
        if not data:
            break
        said += data
    os.close(reading)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None if said == b"held" else said.decode() or "the trial process was killed or hung"


def _enter_namespaces(parent: int) -> int:
    """Returns in process 1 of a new pid namespace, whose root is empty."""
    spaces = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    try:
        linux.unshare(spaces)
    except OSError:
        uid, gid = os.geteuid(), os.getegid()
        linux.unshare(spaces | linux.CLONE_NEWUSER)
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
    pid = os.fork()
    if pid:
        _supervise(pid, parent)
    linux.die_with_parent(signal.SIGKILL)
    linux.mount("none", "/", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/tmp", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, "size=64k,nr_inodes=16")
    os.chdir("/tmp")
    os.mkdir("proc")
    linux.mount("proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    proc = _open_proc("proc")
    linux.detach("proc")
    os.rmdir("proc")
    linux.pivot_root_here()
    unchangeable = linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("none", "/", unchangeable)
    return proc


def _supervise(zygote: int, parent: int) -> NoReturn:
    """The process outside the new pid namespace: ends when the zygote does, and ends it when the trainer is gone."""
    ended = os.pidfd_open(zygote)
    os.dup2(parent, 0)
    os.dup2(ended, 1)
    os.closerange(2, 1 << 20)  # the trainer must see the end of the zygote's socket, not of ours
    select.select([0, 1], [], [])
    with contextlib.suppress(ProcessLookupError):
        os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)
    os._exit(1)


def _enter_empty_folder() -> int:
    proc = _open_proc("/proc")
    folder = tempfile.mkdtemp(prefix="opdkit-empty-")
    os.chdir(folder)
    os.rmdir(folder)  # nothing can be created in a removed folder, and nothing is left behind
    try:
        os.chroot(".")
    except OSError as error:
        raise OSError(f"chroot: {error.strerror} (it takes root with CAP_SYS_CHROOT)") from error
    return proc


def _open_proc(path: str) -> int:
    proc = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    if os.readlink("self", dir_fd=proc) != str(os.getpid()):
        raise OSError(f"{path} belongs to another pid namespace, so memory and time could not be watched")
    return proc


def _landlock_ruleset(abi: int) -> int:
    files = max(bits for first_abi, bits in _HANDLED_FILES.items() if first_abi <= abi)
    handled = [files] + [_HANDLED_NETWORK] * (abi >= 4) + [_SCOPED] * (abi >= 6)
    return linux.landlock_ruleset(handled)


def _require_refused(path: str, flags: int) -> None:
    with contextlib.suppress(OSError):
        os.close(os.open(path, flags))
        raise ValueError(f"{path} could be opened all the same")
