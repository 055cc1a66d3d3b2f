"""Plays the trainer: sets out what must stay out of reach, runs every attack in one tier as one user, and reports.

    python driver.py TIERS UID FOLDER [MACHINE | cells]    prints {"uid", "hello", "results": {name: complaint or null}}

cells: each program is a piece that an interpreter which stays is given (`session.py`).
TIERS: names with commas, or "none" for no walls at all, where only harmless attacks are run. MACHINE: "docker" looks
like Docker's default, "old" has no seccomp; both only describe the sandbox. A process of its own, because it gives up
its user id and because a sandbox that fails must not take pytest with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lookalikes
from attack import ROOMY, Attack

from opdkit.tasks.sandbox import DEFAULT_PRELOAD, End, Job, Sandbox, SandboxUnavailable, linux
from opdkit.tasks.sandbox.session import Interpreters

MARKS = ("/dev/shm", "/tmp", "/var/tmp", "/run", "/")
_MS_BIND = 4096
NO_ENTRY, NO_WALLS = 77, 78  # exit status: an ordinary user cannot enter the interpreter's folder; nothing holds here
# An interpreter that stays has an empty input, its standard error is its standard output, and descriptor 3 is the link
# over which it says that it is done: nobody believes more of it.
OTHERWISE = ("flood: the input grows", "crash: output that is no text", "verdict: reports on every descriptor")
# Without walls these succeed and change nothing outside the folder of the test.
HARMLESS = (
    "read: files by every door",
    "read: /proc",
    "write: the secret file and its folder",
    "processes: fork",
    "processes: programs",
    "net: TCP",
    "net: unix sockets",
)


def main(tiers: list[str], uid: int, folder: Path, machine: str) -> None:
    if uid != os.getuid():
        let_others_in()
    if machine == "cells":
        interpreters = Interpreters(limits=ROOMY, preload=DEFAULT_PRELOAD, tiers=tiers)
        hello, results = interpreters.describe(), run_as_pieces(interpreters, folder)
        print(json.dumps({"uid": os.getuid(), "hello": hello, "results": results}))
        return
    if machine == "docker":
        lookalikes.docker()
    elif machine == "old":
        lookalikes.without_seccomp()
    if uid != os.getuid():
        become(uid)
    try:
        sandbox = Sandbox(allow_unsafe=True) if tiers == ["none"] else Sandbox(tiers=tiers, num_slots=3)
        hello = sandbox.describe()
    except SandboxUnavailable as error:
        print(error)
        sys.exit(NO_WALLS)
    with contextlib.closing(sandbox):
        results = {} if machine else run_attacks(sandbox, folder)
    print(json.dumps({"uid": os.getuid(), "hello": hello, "results": results}))


def run_attacks(sandbox: Sandbox, folder: Path) -> dict[str, str | None]:
    """Attack or question about the world -> what it achieved, None if nothing."""
    from attacks_reach import REACH
    from attacks_resources import RESOURCES
    from attacks_verdict import EXPECTED, VERDICT

    attacks = {attack.name: attack for attack in (*RESOURCES, *REACH, *VERDICT)}
    results: dict[str, str | None] = {}
    if sandbox.describe()["tier"] == "none":
        attacks = {name: attacks[name] for name in HARMLESS}
    with world(folder, EXPECTED) as (places, secrets, complaints):
        jobs = [
            Job(processes=attack.processes(attack.complete(places)), limits=attack.limits, tag=name)
            for name, attack in attacks.items()
        ]
        for done in sandbox.run(jobs):
            attack = attacks[done.job.tag]
            results[attack.name] = done.error or judged(attack, done.ends, secrets)
        results |= {f"world: {name}": complaint() for name, complaint in complaints.items()}
        results["world: no fork server was lost"] = f"{sandbox.num_restarts}" if sandbox.num_restarts else None
    return results


def run_as_pieces(interpreters: Interpreters, folder: Path) -> dict[str, str | None]:
    """As `run_attacks`, of the programs that are one process: each in an interpreter of its own."""
    from attacks_reach import REACH
    from attacks_resources import RESOURCES
    from attacks_verdict import EXPECTED, VERDICT

    attacks = [
        attack
        for attack in (*RESOURCES, *REACH, *VERDICT)
        if attack.processes("")[0].task["mode"] == "script" and attack.name not in OTHERWISE
    ]
    results: dict[str, str | None] = {}
    with world(folder, EXPECTED) as (places, secrets, complaints):

        def outcome(attack: Attack) -> str | None:
            interpreter = interpreters.open(attack.limits)
            ran = interpreter.run(attack.complete(places), limit_s=15.0, max_bytes=attack.limits.output_bytes)
            done = ran.ended or interpreter.end()
            if done is None or done.error:
                return "the sandbox lost it" if done is None else done.error
            text = ran.output[-8000:].decode(errors="replace")
            end = replace(done.ends[0], stdout=ran.output, stderr=text)
            if ran.over is None:  # it waited for the next piece: whatever it was to be stopped for is over
                end = replace(end, reason="exit", is_output_full=ran.num_bytes == attack.limits.output_bytes)
            return judged(attack, (end,), secrets)

        with ThreadPoolExecutor(3) as threads:
            names = [attack.name for attack in attacks]
            results |= dict(zip(names, threads.map(outcome, attacks), strict=True))
        results |= {f"world: {name}": complaint() for name, complaint in complaints.items()}
    interpreters.close()
    return results


def judged(attack: Attack, ends: tuple[End, ...], secrets: list[str]) -> str | None:
    """What it achieved; None: nothing."""
    hostile = ends[-1:]  # of a pair, the first runs the tests and may quote them
    written = "".join(end.stdout.decode(errors="replace") + end.stderr for end in hostile)
    harms = [line for line in written.splitlines() if line.startswith("HARM")]
    seen = [secret for secret in secrets if secret in written]
    complaint = "; ".join(harms)[:500] or (f"it knows {seen}" if seen else None)
    if complaint is None and attack.reasons and ends[0].reason not in attack.reasons:
        complaint = f"ended with {ends[0].reason} {ends[0].code}: {ends[0].stderr[-300:]}"
    return complaint or attack.complaint(ends)


@contextlib.contextmanager
def world(
    folder: Path, expected: str
) -> Iterator[tuple[dict[str, Any], list[str], dict[str, Callable[[], str | None]]]]:
    """Places for the attacks, words they must not know, and questions to ask afterwards."""
    secret, writable = folder / "secret.txt", folder / "writable"
    secret.write_text("the-secret-of-the-file")
    secret.chmod(0o666)
    writable.mkdir()
    writable.chmod(0o777)
    os.environ["OPDKIT_SECRET"] = "the-secret-of-the-environment"
    left_open = os.open(secret, os.O_RDWR)
    os.set_inheritable(left_open, True)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
    before = _state_of(victim.pid, secret)
    listeners = _listeners(folder)
    places = {
        "SECRET_FILE": secret,
        "WRITABLE": writable,
        "TRAINER": os.getpid(),
        "VICTIM": victim.pid,
        "TCP_PORT": _port(listeners.get("tcp")),
        "TCP6_PORT": _port(listeners.get("tcp6")),
        "UDP_PORT": _port(listeners.get("udp")),
        "UNIX_PATH": folder / "socket",
        "ABSTRACT": f"opdkit-{os.getpid()}",
    }

    def changed() -> str | None:
        if not secret.exists():
            return "the secret file is gone"
        after = _state_of(victim.pid, secret)
        return None if victim.poll() is None and after == before else f"{before} became {after}"

    def left_files() -> str | None:
        if not writable.exists():
            return "the writable folder is gone"
        found = [str(path) for path in writable.iterdir()]
        for place in MARKS:
            found += [str(path) for path in Path(place).glob("opdkit-attack*")]
        return str(found) if found else None

    def left_memory() -> str | None:
        names = [Path("/proc/sysvipc") / name for name in ("shm", "msg", "sem")]
        key = str(0x0DDBA11)
        found = [path.name for path in names if path.exists() and key in path.read_text()]
        return str(found) if found else None

    questions: dict[str, Callable[[], str | None]] = {
        "nobody connected": lambda: _visitors(listeners),
        "victim and secret file unchanged": changed,
        "no file was left": left_files,
        "no shared memory was left": left_memory,
    }
    try:
        yield places, ["the-secret-of-the-file", "the-secret-of-the-environment", expected], questions
    finally:
        victim.kill()
        victim.wait()
        for listener in listeners.values():
            listener.close()


def let_others_in() -> None:
    """Opens the interpreter's folders to ordinary users, in a mount namespace of our own. Needs root."""
    try:
        for closed in _closed_folders():
            _open_up(closed)
    except OSError as error:
        print(f"the interpreter lies in a folder that ordinary users cannot enter: {error}", file=sys.stderr)
        sys.exit(NO_ENTRY)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    linux._prctl("PR_SET_DUMPABLE", linux._PR_SET_DUMPABLE, 1)  # as after an exec: an ordinary user's process is


def _closed_folders() -> set[Path]:
    needed = [Path(sys.executable).resolve(), Path(sys.executable).absolute(), Path(__file__).resolve()]
    needed += [Path(path).resolve() for path in sys.path if path]
    return {folder for path in needed for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH}


def _open_up(folder: Path) -> None:
    """Covers a closed folder by an open one with the same entries."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", linux.MS_REC | linux.MS_PRIVATE)
    inside = os.open(folder, os.O_RDONLY)
    entries = [entry for entry in os.scandir(inside) if entry.is_dir(follow_symlinks=False)]
    linux.mount("tmpfs", str(folder), 0, "mode=755")
    for entry in entries:
        (folder / entry.name).mkdir()
        source, target = f"/proc/self/fd/{inside}/{entry.name}".encode(), str(folder / entry.name).encode()
        linux._check("bind mount", linux._libc.mount(source, target, None, _MS_BIND, None))


def _listeners(folder: Path) -> dict[str, socket.socket]:
    listeners = {"tcp": socket.create_server(("127.0.0.1", 0))}
    with contextlib.suppress(OSError):
        listeners["tcp6"] = socket.create_server(("::1", 0), family=socket.AF_INET6)
    listeners["udp"] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listeners["udp"].bind(("127.0.0.1", 0))
    for name, address in (("unix", str(folder / "socket")), ("abstract", f"\0opdkit-{os.getpid()}")):
        for kind, suffix in ((socket.SOCK_STREAM, ""), (socket.SOCK_DGRAM, "-datagrams")):
            listeners[name + suffix] = socket.socket(socket.AF_UNIX, kind)
            listeners[name + suffix].bind(address + suffix)
            if kind == socket.SOCK_STREAM:
                listeners[name].listen()
    (folder / "socket").chmod(0o777)
    return listeners


def _port(listener: socket.socket | None) -> int:
    return 9 if listener is None else int(listener.getsockname()[1])


def _visitors(listeners: dict[str, socket.socket]) -> str | None:
    visited = []
    for name, listener in listeners.items():
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(100)
            visited.append(name)
    return str(visited) if visited else None


def _state_of(pid: int, secret: Path) -> list[Any]:
    status = secret.stat()
    return [
        os.getpriority(os.PRIO_PROCESS, pid),
        sorted(os.sched_getaffinity(pid)),
        resource.prlimit(pid, resource.RLIMIT_CORE),
        _text_of(secret),
        oct(status.st_mode),
        status.st_mtime_ns,
        status.st_nlink,
    ]


def _text_of(secret: Path) -> str:
    try:
        return secret.read_text()
    except OSError as error:  # its mode was changed
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3]), "".join(sys.argv[4:]))
