"""Attacks on memory, time, the number of processes and threads, and what is written."""

from __future__ import annotations

from collections.abc import Callable

from attack import FAST, Attack

from opdkit.tasks.sandbox import End, Limits, Process, with_tests

_CPU = ("cpu",)


def _bounded_output(ends: tuple[End, ...]) -> str | None:
    (end,) = ends
    return None if len(end.stdout) <= 1 << 20 and end.is_output_full else f"{len(end.stdout)} bytes of output"


def _small_errors(ends: tuple[End, ...]) -> str | None:
    return None if len(ends[0].stderr) < 10_000 else "a long error text reached the trainer"


def _bounded_memory(ends: tuple[End, ...]) -> str | None:
    (end,) = ends
    return None if end.reason == "memory" or "MemoryError" in end.stderr else f"ended with {end.reason} {end.code}"


def _one_of_two(ends: tuple[End, ...]) -> str | None:
    """The test program and the tested one together are over the limit, and neither alone."""
    return None if any(end.reason == "memory" for end in ends) else f"{[(end.reason, end.peak_mb) for end in ends]}"


def _two_that_hold(program_mb: int, tests_mb: int) -> Callable[[str], tuple[Process, ...]]:
    tests = f"held = bytearray({tests_mb} << 20)\nassert f(1) == 1"
    return lambda source: with_tests(f"MB = {program_mb}\n{source}", "f", starter="", tests=tests)


# The rest of the program after its main thread has left by the system call that ends a thread alone.
_WITHOUT_MAIN = """
def live_on():
    time.sleep(0.1)
{body}
for _ in range({threads}):
    threading.Thread(target=live_on).start()
libc.syscall(60, 0)
harm("it came back")"""

RESOURCES = [
    Attack(name="memory: 2 GB at once", source="x = bytearray(2 << 30)\nharm(len(x))", complaint=_bounded_memory),
    Attack(
        name="memory: 2 GB shared mapping",
        source="attempt('mmap', lambda: len(mmap.mmap(-1, 2 << 30)))",
    ),
    Attack(
        name="memory: growth in small steps",
        source="held = []\nfor _ in range(1500):\n    held.append(b'x' * (1 << 20))\nharm('1500 MB')",
        complaint=_bounded_memory,
    ),
    Attack(
        name="memory: shared pages in small steps",
        source="""
held = []
for _ in range(150):
    held.append(mmap.mmap(-1, 10 << 20))
    held[-1].write(b"x" * (10 << 20))
harm("1500 MB")""",
        complaint=lambda ends: (
            None if ends[0].reason == "memory" or ends[0].code != 0 else f"{ends[0].reason} {ends[0].code}"
        ),
    ),
    Attack(
        name="memory: five children",
        source="""
for _ in range(5):
    if attempt("fork", os.fork) == 0:
        held = bytearray(100 << 20)
        time.sleep(1)
        os._exit(0)""",
    ),
    Attack(
        name="memory: without its main thread",
        source=_WITHOUT_MAIN.format(
            threads=1,
            body="""
    held = []
    for _ in range(60):
        held.append(bytearray(b"x" * (10 << 20)))
        time.sleep(0.02)
    harm("600 MB")""",
        ),
        reasons=("memory",),
    ),
    Attack(
        name="memory: program and tests together",
        source="def f(x):\n    held = bytearray(MB << 20)\n    time.sleep(1)\n    harm('both held')\n    return x",
        processes=_two_that_hold(90, 90),
        complaint=_one_of_two,
    ),
    Attack(
        name="memory: files that live in memory",
        source="""
attempt("memfd_create", os.memfd_create, "x")
attempt("huge pages", system_call, 9, 0, 2 << 20, 3, 0x40022, -1, 0)
attempt("memfd_secret", system_call, 447, 0)
attempt("/dev/shm", open, "/dev/shm/opdkit-attack", "wb")
attempt("shmget", system_call, 29, 0, 1 << 20, 0o1600)""",
    ),
    Attack(
        name="memory: buffers of pipes and sockets",
        source="""
num = 0
try:
    while num < 500:
        r, w = os.pipe()
        os.set_blocking(w, False)
        os.write(w, b"x" * 65536)
        num += 1
except OSError:
    pass
if num > 40:
    harm(f"{num} full pipes")
attempt("a larger pipe", __import__("fcntl").fcntl, 1, 1031, 1 << 20)""",
    ),
    Attack(
        name="time: deaf to signals",
        source="""
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True: pass
    except BaseException:
        pass""",
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(
        name="time: one endless call in C",
        source="from itertools import repeat\nall(repeat(True))",
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(name="time: a power tower", source="print(len(str(9**9**9)))", limits=FAST, reasons=_CPU),
    Attack(
        name="time: a regular expression that explodes",
        source="import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(
        name="time: four threads",
        source="""
from itertools import repeat
for _ in range(4):
    threading.Thread(target=lambda: all(repeat(True))).start()""",
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(
        name="time: without its main thread",
        source=_WITHOUT_MAIN.format(threads=2, body="    while True: pass"),
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(
        name="time: asleep without its main thread",
        source=_WITHOUT_MAIN.format(threads=2, body="    time.sleep(100)"),
        limits=Limits(cpu_s=1.0, wall_s=0.5),
        reasons=("wall",),
    ),
    Attack(
        name="time: program and tests together",
        source="""
def f(x):
    end = time.process_time() + 0.3
    while time.process_time() < end: pass""",
        processes=lambda source: with_tests(
            source,
            "f",
            starter="import time",
            tests="for _ in range(9):\n    f(1)\n    end = time.process_time() + 0.3\n"
            "    while time.process_time() < end: pass",
        ),
        complaint=lambda ends: (
            None
            if any(end.reason == "cpu" for end in ends) and sum(end.cpu_s for end in ends) < 4.0  # of ROOMY's 3
            else f"{[(end.reason, end.cpu_s) for end in ends]}"
        ),
    ),
    Attack(
        name="time: raised limits and timers put off",
        source="""
import resource
for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    attempt(f"raise {limit}", resource.setrlimit, limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    attempt(f"prlimit {limit}", resource.prlimit, os.getpid(), limit, (-1, -1))
signal.setitimer(signal.ITIMER_PROF, 0)
while True: pass""",
        limits=FAST,
        reasons=_CPU,
    ),
    Attack(
        name="time: sleep",
        source="time.sleep(100)\nharm('slept')",
        limits=Limits(cpu_s=1.0, wall_s=0.5),
        reasons=("wall",),
    ),
    Attack(
        name="time: stops itself",
        source="os.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()",
        limits=Limits(cpu_s=1.0, wall_s=0.5),
        reasons=("wall",),
    ),
    Attack(
        name="processes: fork",
        source="""
for _ in range(20):
    if attempt("fork", os.fork) == 0:
        time.sleep(0.2)
        os._exit(0)""",
    ),
    Attack(
        name="processes: by other doors",
        source="""
SIGCHLD = 17
def child_of(number, *arguments):
    pid = system_call(number, *arguments)
    if pid == 0:
        os._exit(0)
    return pid
clone_args = ctypes.create_string_buffer(struct.pack("<8Q", 0, 0, 0, 0, SIGCHLD, 0, 0, 0))
attempt("SYS_fork", child_of, 57)
attempt("SYS_vfork", child_of, 58)
attempt("SYS_clone", child_of, 56, SIGCHLD, 0, 0, 0, 0)
attempt("SYS_clone CLONE_VM", child_of, 56, 0x100 | 0x4000 | SIGCHLD, 0, 0, 0, 0)
attempt("SYS_clone CLONE_PARENT", child_of, 56, 0x8000 | SIGCHLD, 0, 0, 0, 0)
attempt("SYS_clone3", child_of, 435, clone_args, 64)
attempt("forkpty", os.forkpty)""",
    ),
    Attack(
        name="processes: programs",
        source="""
attempt("subprocess", subprocess.run, [sys.executable, "-c", "pass"])
attempt("posix_spawn", os.posix_spawn, "/bin/true", ["true"], {})
attempt("popen", lambda: os.popen("id").read())
attempt("execveat", system_call, 322, -100, b"/bin/true", 0, 0, 0)
if os.system("true") == 0: harm("system")
import multiprocessing
attempt("multiprocessing", lambda: multiprocessing.get_context("fork").Process(target=print).start())
attempt("exec", os.execv, "/bin/true", ["true"])
attempt("exec of memory", os.execve, 0, ["x"], {})""",
    ),
    Attack(
        name="processes: 1500 threads",
        source="""
threading.stack_size(1 << 15)
gate = threading.Event()
num = 0
try:
    while num < 1500:
        threading.Thread(target=gate.wait, daemon=True).start()
        num += 1
except RuntimeError:
    pass
time.sleep(0.5)
harm(f"{num} threads") if num > 64 else None
os._exit(3)""",
        complaint=lambda ends: (
            None if ends[0].reason == "threads" or ends[0].code == 3 else f"{ends[0].reason} {ends[0].code}"
        ),
    ),
    Attack(
        name="processes: 1500 threads without their main thread",
        source="""
threading.stack_size(1 << 15)
gate = threading.Event()
def breed():
    num = 0
    try:
        while num < 1500:
            threading.Thread(target=gate.wait, daemon=True).start()
            num += 1
    except RuntimeError:
        pass
    time.sleep(0.5)
    harm(f"{num} threads") if num > 64 else None
    os._exit(3)
threading.Thread(target=breed).start()
libc.syscall(60, 0)""",
        complaint=lambda ends: (
            None if ends[0].reason == "threads" or ends[0].code == 3 else f"{ends[0].reason} {ends[0].code}"
        ),
    ),
    Attack(
        name="flood: standard output",
        source="""
for _ in range(64):
    try:
        os.write(1, b"x" * (1 << 20))
    except OSError:
        break
else:
    harm("64 MB of output")""",
        complaint=_bounded_output,
    ),
    Attack(
        name="flood: standard error",
        source="for _ in range(64):\n    os.write(2, b'x' * (1 << 20))\nharm('64 MB of errors')",
        complaint=_small_errors,
    ),
    Attack(
        name="flood: a line without an end through print",
        source="while True: print('x' * 100000, end='')",
        complaint=_bounded_output,
    ),
    Attack(
        name="flood: holes in the output",
        source="""
attempt("ftruncate", os.ftruncate, 1, 1 << 40)
attempt("write far away", os.pwrite, 1, b"x", 1 << 40)
attempt("a mapping beyond the limit", lambda: mmap.mmap(1, 1 << 30).__setitem__(1 << 29, 1))
attempt("fallocate", os.posix_fallocate, 1, 0, 1 << 30)""",
    ),
    Attack(
        name="flood: the input grows",
        source="""
attempt("write to stdin", os.write, 0, b"x")
attempt("truncate stdin", os.ftruncate, 0, 0)
attempt("grow stdin", os.ftruncate, 0, 1 << 30)
attempt("map stdin", lambda: mmap.mmap(0, 13).__setitem__(0, 0))""",
    ),
    Attack(
        name="flood: disk",
        source="""
for folder in ("@WRITABLE@", "/tmp", "/dev/shm", "/var/tmp", "/run", ".", "/"):
    for number in range(3):
        path = f"{folder}/opdkit-attack-{number}"
        attempt(path, lambda: open(path, "wb").write(b"x" * (1 << 20)))""",
    ),
    Attack(
        name="flood: folders",
        source="""
for folder in ("@WRITABLE@", "/tmp", "/"):
    attempt("mkdir", os.mkdir, folder + "/opdkit-attack-folder")
    attempt("mkfifo", os.mkfifo, folder + "/opdkit-attack-fifo")
    attempt("mknod", os.mknod, folder + "/opdkit-attack-node", 0o600 | 0o020000, os.makedev(1, 3))
    attempt("symlink", os.symlink, "/", folder + "/opdkit-attack-link")""",
    ),
    Attack(
        name="crash: segmentation fault",
        source="ctypes.string_at(8)",
        complaint=lambda ends: None if ends[0].code == -11 else f"code {ends[0].code}",
    ),
    Attack(
        name="crash: kills itself",
        source="os.kill(os.getpid(), 9)",
        complaint=lambda ends: None if (ends[0].reason, ends[0].code) == ("exit", -9) else f"{ends[0]}",
    ),
    Attack(
        name="crash: the C stack",
        source="""
sys.setrecursionlimit(1 << 30)
from functools import lru_cache
@lru_cache(None)
def f(n): return f(n + 1)
f(0)""",
        limits=Limits(cpu_s=8.0, wall_s=40.0, memory_mb=700),
        complaint=lambda ends: None if ends[0].code != 0 else "it returned",
    ),
    Attack(
        name="crash: output that is no text",
        source="os.write(1, bytes(range(256)) * 40)\nos.write(2, bytes(range(255, 0, -1)) * 40)\nos.abort()",
        complaint=lambda ends: None if ends[0].code == -6 and len(ends[0].stdout) == 10240 else f"code {ends[0].code}",
    ),
]
