"""`opdkit train --ranks N`: the ranks of one machine, started together and ended together.

The rendezvous listens on a loopback socket that is bound here and handed to rank 0, so that no port can be taken by
somebody else in between. Rank 0 speaks on the terminal; the others write to ranks/rank_1.log and so on in the run's
folder. A signal is passed on to all, which agree at which step to stop. Where a rank ends that should not have, the
others are ended, and what happened is said in one sentence. Ranks do not outlive the launcher (`ranks/join.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from opdkit.errors import PAUSED, UserError
from opdkit.ranks.base import LOST
from opdkit.ranks.join import LISTENS_AT, NUM_RANKS
from opdkit.recipe import Recipe
from opdkit.run.console import Console, say
from opdkit.run.folder import RunFolder
from opdkit.tasks.pool import usable_cores

GRACE_S = 1.0  # for the others to end by themselves, once a rank has ended that should not have
LOST_S = 5.0  # for the one that they lost, where only ranks have ended that lost one: it may be ending, too
STOP_S = 10.0  # after a second Ctrl-C
POLL_S = 0.05
SENTENCES = 20  # of a rank's refusal
STOPPED = 130
HOST = "127.0.0.1"


def launch_training(command: Sequence[str], num_ranks: int, recipe: Recipe, *, again: str, errors: Console) -> int:
    """`opdkit train` on so many ranks, see `launch`. Raises UserError for a folder that cannot hold the run."""
    folder = RunFolder.check(recipe.run_dir, resume="--resume" in command, overwrite="--overwrite" in command)
    logs = Logs(folder.path, came_of_it=folder.recipe.exists, keep="--resume" in command)
    minutes = recipe.parallel.timeout_minutes
    return launch(command, num_ranks, logs, again=again, errors=errors, timeout_minutes=minutes)


def launch(
    command: Sequence[str], num_ranks: int, logs: Logs, *, again: str, errors: Console, timeout_minutes: float
) -> int:
    """Run `opdkit <command>` on so many ranks; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C, 3 where a
    run paused, else 1.

    again: the command that goes on with it.
    """
    try:
        ranks = _Ranks(command, num_ranks, logs)
        try:
            culprit = ranks.watch()
        finally:
            ranks.end()
        if culprit is None:
            return 0
        status = ranks.status(culprit)
        if status == 2 and culprit:
            say(errors, *(f"rank {culprit}: {line}" for line in logs.errors(culprit)), mark="error")
        if status == STOPPED and not ranks.ended_by_itself(0):
            say(errors, "Stopped. What was saved is whole; go on with:", f"  {again}")
        if status in (2, PAUSED, STOPPED):
            return status
        how = ranks.how_it_ended(culprit, timeout_minutes)
        said = "what it said is above" if culprit == 0 else f"its log is {logs.of(culprit)}"
        say(errors, f"rank {culprit} of {num_ranks} {how}, and the run has ended; {said}", mark="error")
        say(errors, "What was saved is whole; go on with:", f"  {again}")
        return 1
    finally:
        logs.close()


class Logs:
    """ranks/ of a folder that ranks write to; gone again where nothing came of it."""

    def __init__(self, folder: Path, *, came_of_it: Callable[[], bool], keep: bool = False) -> None:
        """keep: what is there; new lines are put behind it. Raises UserError for a place where it cannot be."""
        self._came_of_it, self._path = came_of_it, folder / "ranks"
        self._made = [path for path in (self._path, *self._path.parents) if not path.exists()]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            for old in () if keep else self._path.glob("rank_*.log"):
                old.unlink()
            self._sizes = {path: path.stat().st_size for path in self._path.glob("rank_*.log")}
        except OSError as error:
            raise UserError(f"cannot write to {self._path} ({error.strerror}); choose another place") from None

    def of(self, rank: int) -> Path:
        return self._path / f"rank_{rank}.log"

    def errors(self, rank: int) -> list[str]:
        """The sentences of a refusal."""
        new = self.of(rank).read_bytes()[self._sizes.get(self.of(rank), 0) :]
        lines = new.decode(errors="replace").splitlines()
        return [line.removeprefix("error ") for line in lines if line.startswith("error ")][:SENTENCES]

    def close(self) -> None:
        if self._came_of_it():
            return
        for log in self._path.glob("rank_*.log"):
            log.unlink()
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                return


class _Ranks:
    """The processes while they last."""

    def __init__(self, command: Sequence[str], num_ranks: int, logs: Logs) -> None:
        self._logs, self._num_signals, self._deadline = logs, 0, float("inf")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._old = {number: signal.signal(number, self._hear) for number in _to_pass_on()}
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            listener.listen(num_ranks)
            for rank in range(num_ranks):
                self._processes.append(self._start(command, rank, num_ranks, listener))

    def watch(self) -> int | None:
        """Until all have ended, or those that are left were waited for; returns the rank that was to blame, if one."""
        running, bad, self._hung = set(range(len(self._processes))), list[int](), list[int]()
        while running and time.monotonic() < self._deadline:
            for rank in sorted(running):
                if (status := self.status(rank)) is not None:
                    running.remove(rank)
                    bad += [rank] if status else []
            if bad:
                grace = LOST_S if all(self.status(rank) == LOST for rank in bad) else GRACE_S
                self._deadline = min(self._deadline, time.monotonic() + grace)
            time.sleep(POLL_S)
        to_blame = [rank for rank in bad if self.status(rank) != LOST]
        if not to_blame:  # the others waited for one that does not answer
            self._hung = sorted(running) if bad else []
            to_blame = self._hung or bad
        if 0 in to_blame and self.status(0) in (2, PAUSED, STOPPED):  # several found the same, and rank 0 has said so
            return 0
        return to_blame[0] if to_blame else None

    def end(self) -> None:
        """Whoever is left; afterwards nobody is."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def status(self, rank: int) -> int | None:
        """As a shell has it; of a rank that our signal ended before it could listen, as after Ctrl-C."""
        status = self._processes[rank].poll()
        return STOPPED if self._num_signals and status is not None and -status in _to_pass_on() else status

    def ended_by_itself(self, rank: int) -> bool:
        status = self._processes[rank].returncode
        return status is not None and status >= 0

    def how_it_ended(self, rank: int, timeout_minutes: float) -> str:
        status = self.status(rank)
        if rank in self._hung:
            return f"did not answer the others within parallel.timeout_minutes = {timeout_minutes:g}"
        if status == LOST:
            return f"heard nothing from another one for parallel.timeout_minutes = {timeout_minutes:g}"
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            why = " (is the machine out of memory?)" if name == "SIGKILL" else ""
            return f"was ended by {name}{why}"
        return f"ended with status {status}"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Each rank does with it what one process would."""
        self._num_signals += 1
        if self._num_signals > 1:
            self._deadline = min(self._deadline, time.monotonic() + STOP_S)
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _start(
        self, command: Sequence[str], rank: int, num_ranks: int, listener: socket.socket
    ) -> subprocess.Popen[bytes]:
        environment = environment_of(rank, num_ranks, listener)
        fds = [listener.fileno()] if rank == 0 else []
        with ExitStack() as opened:
            log = opened.enter_context(self._logs.of(rank).open("ab")) if rank else None
            return subprocess.Popen(
                [sys.executable, "-m", "opdkit", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                start_new_session=True,  # a terminal's Ctrl-C is for the launcher, who passes it on
            )


def environment_of(rank: int, num_ranks: int, listener: socket.socket) -> dict[str, str]:
    """What torchrun sets, and loopback for what the ranks tell each other."""
    threads = str(max(1, usable_cores() // num_ranks))
    loopback = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo") if sys.platform == "linux" else {}
    return {
        **loopback,
        "OMP_NUM_THREADS": threads,
        **os.environ,
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(num_ranks) for name in (NUM_RANKS, "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(listener.getsockname()[1]),
        LISTENS_AT: str(listener.fileno()) if rank == 0 else "",
    }


def _to_pass_on() -> list[signal.Signals]:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asked for work that outlives its shell
        numbers.append(signal.SIGHUP)
    return numbers
