"""The far side of `pool.py`: the fork server and the workers it forks. Runs in its own interpreter, single-threaded.

    server: import the handler -> warm it up -> for every command: fork a worker on the socket it came with, or kill one
    worker: confine itself -> for every request: arm the CPU timer, handle, reply

Frames are a 4-byte big-endian length and that many bytes of JSON. Standard library only, plus the handler.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any, NoReturn

SPAWN, KILL = b"S", b"K"
COMMAND = struct.Struct("!cq")  # code, pid (0 for SPAWN, which carries the worker's socket)
REPLY = struct.Struct("!qq")  # pid, wait status
MAX_FRAME_BYTES = 1 << 20
_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ORPHAN_CHECK_S = 0.5
_MAX_DESCRIPTORS = 64
_MAX_MESSAGE_CHARACTERS = 500


def serve(argv: list[str]) -> NoReturn:
    """Entry point of the server; argv = [_, sys.path, control descriptor, handler module, limits]."""
    parent = os.getppid()
    control = socket.socket(fileno=int(argv[2]))
    handler_name, limits = argv[3], json.loads(argv[4])
    try:
        handler = importlib.import_module(handler_name)
        handler.warm_up()
    except BaseException:
        send_frame(control, json.dumps({"error": traceback.format_exc()}).encode())
        sys.exit(1)
    gc.collect()
    gc.freeze()  # the collector then leaves the shared pages alone, and forks stay cheap
    send_frame(control, json.dumps({"error": None}).encode())
    workers: set[int] = set()
    try:
        while _next_command_arrives(control, parent):
            command, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if len(command) < COMMAND.size:
                break
            code, pid = COMMAND.unpack(command)
            if code == SPAWN:
                pid = _fork_worker(control, socket.socket(fileno=descriptors[0]), handler, limits)
                workers.add(pid)
                control.sendall(REPLY.pack(pid, 0))
            else:
                workers.remove(pid)
                control.sendall(REPLY.pack(pid, _kill(pid)))
    except (OSError, EOFError):
        pass  # the trainer is gone in the middle of a command
    for pid in workers:
        _kill(pid)
    os._exit(0)


def confine(limits: dict[str, Any]) -> None:
    """Gives up what a grader does not need. A seccomp filter, which cannot be undone, would be installed here, last."""
    if sys.platform == "linux":
        # The server is single-threaded, so "the parent thread ended" means that the server ended.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(resource.RLIMIT_AS, _address_space_bytes() + limits["memory_mb"] * 1024 * 1024)
    _limit(resource.RLIMIT_CPU, int(limits["cpu_s"] * limits["recycle_after"]) + 10)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS)
    _limit(resource.RLIMIT_NPROC, 0)  # no forks, no threads (root is exempt from this one)


def send_frame(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_frame(connection: socket.socket) -> bytes:
    """Blocks for one frame. EOFError when the other side is gone."""
    (length,) = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size))
    return receive_exactly(connection, length)


def take_frame(received: bytearray) -> bytes | None:
    """Removes one whole frame from the front of `received`; None if it has not arrived yet."""
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    end = _LENGTH.size + length
    if len(received) < end:
        return None
    frame = bytes(received[_LENGTH.size : end])
    del received[:end]
    return frame


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        data = connection.recv(num_bytes - len(received))
        if not data:
            raise EOFError("the other side closed its socket")
        received += data
    return bytes(received)


def _next_command_arrives(control: socket.socket, parent: int) -> bool:
    """Waits; False once the trainer is gone. Its death is seen as the end of the socket, or, where a process it forked
    still holds a copy of the socket, as a new parent."""
    while not select.select([control], [], [], _ORPHAN_CHECK_S)[0]:
        if os.getppid() != parent:
            return False
    return True


def _fork_worker(control: socket.socket, connection: socket.socket, handler: Any, limits: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        connection.close()
        return pid
    try:
        control.close()
        confine(limits)
        _work(connection, handler, limits["cpu_s"])
    finally:
        os._exit(1)


def _work(connection: socket.socket, handler: Any, cpu_s: float) -> NoReturn:
    while True:
        try:
            request = json.loads(receive_frame(connection))
        except EOFError:
            os._exit(0)
        # The default action of SIGPROF ends the process, whatever code is running: no handler, nothing to catch.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            reply = {"status": "ok", "value": handler.handle(request)}
        except MemoryError:
            reply = {"status": "memory", "value": None}
        except Exception as error:
            reply = {"status": "crash", "value": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARACTERS]}
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        send_frame(connection, json.dumps(reply).encode())


def _limit(name: int, value: int) -> None:
    with contextlib.suppress(ValueError):  # the hard limit is lower already
        resource.setrlimit(name, (value, value))


def _kill(pid: int) -> int:
    """Ends and reaps a worker; its wait status. A worker that had ended by itself keeps its own status."""
    os.kill(pid, signal.SIGKILL)  # our unreaped child, so the number cannot belong to anyone else
    return os.waitpid(pid, 0)[1]


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
