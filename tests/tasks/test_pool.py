"""The worker pool: order, limits, death, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdkit.tasks.pool import Outcome, WorkerPool

HANDLER = """
import os, resource, sys, time

def warm_up():
    pass

def handle(request):
    kind, value = request
    if kind == "echo":
        return value
    if kind == "pid":
        return os.getpid()
    if kind == "spin":
        while True:
            pass
    if kind == "big_power":
        return len(str(9 ** (9 ** 9)))
    if kind == "sleep":
        time.sleep(value)
    if kind == "allocate":
        return len(bytearray(value << 20))
    if kind == "exit":
        os._exit(value)
    if kind == "raise":
        raise ValueError(value)
    if kind == "write":
        try:
            with open(value, "w") as file:
                file.write("x")
        except OSError as error:
            return type(error).__name__
    if kind == "environment":
        return dict(os.environ)
    if kind == "torch":
        return "torch" in sys.modules
    if kind == "once":  # dies the first time, answers the second
        if os.path.exists(value):
            return "second"
        os.mkdir(value)
        os._exit(1)
    if kind == "kill_server":
        if os.path.exists(value):
            return "second"
        os.mkdir(value)
        os.kill(os.getppid(), 9)
        time.sleep(60)
    if kind == "interval":
        start = time.monotonic()
        time.sleep(value)
        return [start, time.monotonic()]
"""


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("handlers")
    (folder / "toy_handler.py").write_text(HANDLER)
    sys.path.insert(0, str(folder))
    yield "toy_handler"
    sys.path.remove(str(folder))


@pytest.fixture
def pool(handler: str) -> Iterator[WorkerPool]:
    pool = WorkerPool(handler, num_workers=2, cpu_s=0.3, wall_s=3.0, memory_mb=256, recycle_after=100)
    yield pool
    pool.close()


def ok(value: object) -> Outcome:
    return Outcome(status="ok", value=value)


def descendants(pid: int) -> set[int]:
    """Living processes below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if fields[0] not in "ZX":
                    parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        found |= below
    return found


def wait_until_gone(pids: set[int], limit_s: float = 5.0) -> set[int]:
    """Those still alive after `limit_s`. A zombie is dead: reaping it is the business of whoever adopted it."""
    deadline_s = time.monotonic() + limit_s
    while (alive := {pid for pid in pids if is_alive(pid)}) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return alive


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_answers_keep_their_order_and_all_workers_are_busy(pool: WorkerPool) -> None:
    """500 requests in order; two slow requests run at the same time."""
    assert pool.map([["echo", i] for i in range(500)]) == [ok(i) for i in range(500)]
    first, second = (outcome.value for outcome in pool.map([["interval", 0.6], ["interval", 0.6]]))
    assert max(first[0], second[0]) < min(first[1], second[1])


def test_nothing_starts_before_the_first_request(handler: str) -> None:
    """Making a pool costs nothing, nor does an empty batch."""
    pool = WorkerPool(handler)
    assert pool.map([]) == []
    assert pool.stats.num_servers_started == 0


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (["spin", 0], "timeout"),
        (["big_power", 0], "timeout"),
        (["sleep", 60], "timeout"),
        (["allocate", 4096], "memory"),
    ],
)
def test_an_answer_without_end_costs_one_worker(pool: WorkerPool, request_: list[object], status: str) -> None:
    """Endless loops, 9**9**9 inside one C call (no Python handler could run), sleeping and allocating: that request is
    lost, its neighbours are not, and the pool goes on. It does not show that a neighbour is not slowed down."""
    batch = [["echo", 1], request_, ["echo", 2], ["echo", 3]]
    assert pool.map(batch) == [ok(1), Outcome(status=status), ok(2), ok(3)]  # type: ignore[arg-type]
    assert pool.map([["echo", 4]]) == [ok(4)]
    assert (pool.stats.num_timeouts, pool.stats.num_memory) == ((0, 1) if status == "memory" else (1, 0))
    assert pool.stats.num_workers_started == 3


def test_the_cpu_limit_counts_cpu_not_waiting(pool: WorkerPool) -> None:
    """0.8 s of wall time within 0.3 s of CPU time is fine: a busy machine does not change verdicts."""
    assert pool.map([["sleep", 0.8]]) == [ok(None)]


def test_allocations_within_the_limit_are_fine(pool: WorkerPool) -> None:
    """The limit is what comes on top of the warm server."""
    assert pool.map([["allocate", 100]]) == [ok(100 << 20)]


def test_a_failing_handler_is_a_crash_with_its_message(pool: WorkerPool) -> None:
    """The grader's own failure is told apart from a wrong answer, at once."""
    assert pool.map([["raise", "boo"]]) == [Outcome(status="crash", value="ValueError: boo")]


def test_a_worker_that_dies_is_replaced_and_its_request_tried_once_more(pool: WorkerPool, tmp_path: Path) -> None:
    """A death that does not repeat goes unnoticed; one that does is a crash, and is counted."""
    batch = [["once", str(tmp_path / "mark")], ["exit", 3], ["exit", 0], ["echo", 1]]
    assert pool.map(batch) == [ok("second"), Outcome(status="crash"), Outcome(status="crash"), ok(1)]
    assert pool.stats.num_crashes == 2


def test_the_server_is_replaced_too(pool: WorkerPool, tmp_path: Path) -> None:
    """If the server is killed (out of memory, say) the requests in flight are repeated, not scored."""
    assert pool.map([["kill_server", str(tmp_path / "mark")], ["echo", 1]]) == [ok("second"), ok(1)]
    assert pool.stats.num_servers_started == 2


def test_workers_are_recycled(pool: WorkerPool) -> None:
    """No process serves more than `recycle_after` requests."""
    pids = [outcome.value for outcome in pool.map([["pid", 0]] * 450)]
    assert max(pids.count(pid) for pid in set(pids)) <= 100


def test_workers_see_no_environment_no_torch_and_cannot_write(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is confined today. Reading files and opening sockets are not: that takes the seccomp filter."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    environment, torch, write = (
        outcome.value for outcome in pool.map([["environment", 0], ["torch", 0], ["write", str(tmp_path / "file")]])
    )
    fixed = {"LANG", "PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX"}
    assert fixed <= set(environment) <= fixed | {"LD_LIBRARY_PATH", "PYTHONHOME", "LC_CTYPE"}
    assert torch is False
    assert write == "OSError"
    assert not (tmp_path / "file").read_text()


def test_close_ends_everything_and_may_be_called_twice(handler: str) -> None:
    """No process is left; a closed pool starts afresh when it is used again."""
    pool = WorkerPool(handler, num_workers=2)
    before = descendants(os.getpid())
    pool.map([["echo", 1]])
    ours = descendants(os.getpid()) - before
    assert len(ours) == 3  # the server and two workers
    pool.close()
    pool.close()
    assert not wait_until_gone(ours)
    assert pool.map([["echo", 2]]) == [ok(2)]
    pool.close()


def test_a_forgotten_pool_is_ended_by_the_garbage_collector(handler: str) -> None:
    """A pool nobody closed does not outlive its last reference."""
    before = descendants(os.getpid())
    pool = WorkerPool(handler, num_workers=1)
    pool.map([["echo", 1]])
    ours = descendants(os.getpid()) - before
    del pool
    assert not wait_until_gone(ours)


@pytest.mark.parametrize("kind", ["spin", "sleep"])
def test_nothing_outlives_a_killed_trainer(handler: str, kind: str) -> None:
    """kill -9 of the trainer in the middle of a batch, while a forked helper still holds copies of its sockets: server
    and busy workers are gone within seconds. (Whether the machine's init reaps them is not tested.)"""
    script = f"""
        import os, sys, time
        sys.path.insert(0, {sys.path[0]!r})
        from opdkit.tasks.pool import WorkerPool
        pool = WorkerPool({handler!r}, num_workers=2, cpu_s=60, wall_s=60)
        pool.map([["echo", 1]])
        if os.fork() == 0:
            os.setsid()
            time.sleep(20)
            os._exit(0)
        print("ready", flush=True)
        pool.map([[{kind!r}, 60]] * 4)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer.stdout:
        assert trainer.stdout.readline() == "ready\n"
        time.sleep(0.2)
        below = descendants(trainer.pid)
        (helper,) = [pid for pid in below if b"opdkit.tasks._worker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(below) == 4  # server, two workers, helper
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
        left = wait_until_gone(below - {helper})
        os.kill(helper, signal.SIGKILL)
    assert not left


def test_an_interrupted_batch_does_not_answer_the_next_one(pool: WorkerPool) -> None:
    """Ctrl-C while requests are in flight: the exception passes, and the next batch gets its own answers."""
    pool.map([["echo", 0]])
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has SIGINT ignored
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.map([["sleep", 1.0], ["sleep", 1.0]])
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert pool.map([["echo", 7], ["echo", 8]]) == [ok(7), ok(8)]


def test_a_server_that_cannot_start_says_why() -> None:
    """The traceback of the failed import reaches the trainer, instead of ungraded answers."""
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'no_such_handler'"):
        WorkerPool("no_such_handler").map([["echo", 1]])


DIES_AT_START = """
import os
from pathlib import Path

def warm_up():
    mark = Path(__file__).with_suffix(".deaths")
    left = int(mark.read_text())
    if left:
        mark.write_text(str(left - 1))
        os.kill(os.getpid(), 9)

def handle(request):
    return request
"""


@pytest.mark.parametrize("num_deaths", [1, 3, 4])
def test_a_server_that_dies_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_deaths: int
) -> None:
    """Up to three times in a batch, as one that dies later; a machine on which it never lives is told of."""
    (tmp_path / "dying_handler.py").write_text(DIES_AT_START)
    mark = tmp_path / "dying_handler.deaths"
    mark.write_text(str(num_deaths))
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = WorkerPool("dying_handler", num_workers=1)
    if num_deaths > 3:
        with pytest.raises(RuntimeError, match="dying_handler died 4 times \\(while it started, the last time\\)"):
            pool.map([["echo", 1]])
    assert pool.map([1, 2]) == [ok(1), ok(2)]
    assert (mark.read_text(), pool.stats.num_servers_started) == ("0", 1)
    pool.close()
