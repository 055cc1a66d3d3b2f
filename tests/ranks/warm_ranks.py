"""As `faults/warm.py`, a process that has everything imported and works in forks, of which no one computed before; here
the ranks of a command are forks too. What a fork does is what a new process does behind its imports.

A job is a line of JSON on standard input: {"argv"} of `opdkit`, or {"script", "job", "ranks"} for a script that each of
several ranks runs; {"out", "err"}: where it says what it says. On standard output comes {"pid"}, then {"status",
"seconds"}.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from warm import EAGER

from opdkit import launch

FOR_RANKS = ("opdkit.ranks.group", "opdkit.engines.load_in_parts", "opdkit.training.models.sharded",
             "opdkit.training.models.student_server", "opdkit.analysis.fit", "opdkit.training.saved.spool")  # fmt: skip


class Fork:
    """A process as `subprocess.Popen` starts one, as far as `launch.py` asks of it; it does `do`."""

    def __init__(
        self, do: Callable[[], None], *, env: Mapping[str, str], out: int, err: int, pass_fds: Sequence[int] = ()
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os._exit(_in_fork(do, env, out, err, pass_fds))

    @classmethod
    def of_command(
        cls, command: Sequence[str], *, env: Mapping[str, str], stdin: int, stdout: Any, stderr: Any,
        pass_fds: Sequence[int], start_new_session: bool,
    ) -> Fork:  # fmt: skip
        """In the place of `subprocess.Popen`."""
        out, err = (n if said is None else said.fileno() for n, said in ((1, stdout), (2, stderr)))
        return cls(lambda: _opdkit(command[3:]), env=env, out=out, err=err, pass_fds=pass_fds)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ended(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            child, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if child else None
        return self.returncode


def _in_fork(do: Callable[[], None], env: Mapping[str, str], out: int, err: int, pass_fds: Sequence[int]) -> int:
    """Returns the exit status."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    said = [os.dup(number) for number in (out, err)]
    os.dup2(said[0], 1)
    os.dup2(said[1], 2)
    start = 3
    for kept in (*sorted(pass_fds), 1024):
        os.closerange(start, kept)
        start = kept + 1
    os.environ.clear()
    os.environ.update(env)
    code: Any = 0
    try:
        do()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def _opdkit(argv: Sequence[str]) -> None:
    from opdkit import cli

    sys.argv = ["opdkit", *argv]
    cli.main()


def _scripts(script: str, job: str, num_ranks: int) -> None:
    def do() -> None:
        sys.argv = [script, job]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")

    with socket.socket() as listener:
        listener.bind((launch.HOST, 0))
        listener.listen(num_ranks)
        ranks = []
        for rank in range(num_ranks):
            env = launch.environment_of(rank, num_ranks, listener)
            ranks.append(Fork(do, env=env, out=1, err=2, pass_fds=[listener.fileno()]))
    sys.exit(max(abs(rank.wait() or 0) for rank in ranks))


def main() -> None:
    for name in (*EAGER, *FOR_RANKS):
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen3")  # takes a quarter of a run, and is kept
    launch.subprocess = SimpleNamespace(Popen=Fork.of_command, DEVNULL=-3)  # type: ignore[assignment]
    with os.fdopen(os.dup(1), "w") as answers:
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            out, err = (os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for name in ("out", "err"))

            def do(job: Mapping[str, Any] = job) -> None:
                _opdkit(job["argv"]) if "argv" in job else _scripts(job["script"], job["job"], job["ranks"])

            child = Fork(do, env=dict(os.environ), out=out, err=err)
            os.close(out)
            os.close(err)
            print(json.dumps({"pid": child.pid}), file=answers, flush=True)
            _, status, used = os.wait4(child.pid, 0)
            told = {"status": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
            print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
