"""Programs that must not succeed, run before any other: a zygote whose walls let one of them through is not used."""

from __future__ import annotations

import json

from opdkit.tasks.sandbox.jobs import Done, Job, Limits, script

_MEMORY_MB = 256
_ATTEMPTS = """
import json, os, socket, sys

def attempt(name, function):
    try:
        function()
        succeeded.append(name)
    except (OSError, MemoryError):
        pass

succeeded = []
for path in ("/", "/etc/passwd", "/proc/self/environ", os.__file__):
    attempt("opened " + path, lambda: os.open(path, os.O_RDONLY))
attempt("created a file", lambda: (os.open("/tmp/opdkit-canary", os.O_CREAT, 0o600), os.remove("/tmp/opdkit-canary")))
attempt("listed /proc", lambda: os.listdir("/proc"))
attempt("made a socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("signalled its parent", lambda: os.kill(os.getppid(), 0))
attempt("took 3 GB of memory", lambda: bytearray(3 << 30))
attempt("executed a program", lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"]))
own = os.getpid()
attempt("forked", os.fork)
if os.getpid() != own:
    os._exit(0)
print(json.dumps(succeeded))
"""


def jobs() -> list[Job]:
    return [
        Job(processes=script(_ATTEMPTS, b""), limits=Limits(cpu_s=5.0, wall_s=20.0, memory_mb=_MEMORY_MB), tag="walls"),
        Job(processes=script("while True: pass", b""), limits=Limits(cpu_s=0.1, wall_s=60.0), tag="time"),
    ]


def complaint(done: Done) -> str | None:
    """What the walls let through; None if they held."""
    if done.error is not None:
        return f"the canary could not be run: {done.error}"
    (end,) = done.ends
    if done.job.tag == "time":
        return None if end.reason == "cpu" else f"an endless loop was not stopped by its CPU limit ({end.reason})"
    if end.reason != "exit" or end.code != 0:
        return f"the canary ended with {end.reason} {end.code}: {end.stderr[-300:]}"
    try:
        succeeded = json.loads(end.stdout)
    except ValueError:
        return "the canary made no report"
    return f"a program {', '.join(succeeded)}" if succeeded else None
