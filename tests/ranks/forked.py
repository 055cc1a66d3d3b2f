"""Commands and ranks in forks of one warm process (`warm_ranks.py`): the imports of each cost five times a tiny run."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@dataclass(slots=True)
class Started:
    """A command that is under way; the next one can be started when it has ended."""

    process: Warm
    pid: int
    said: list[Path]
    done: Done | None = None

    def wait(self, timeout: float | None = None) -> Done:
        if self.done is None:
            told = self.process.hear(timeout)
            texts = [path.read_text(errors="replace") for path in self.said]
            self.done = Done(told["status"], *texts)
        return self.done

    def kill(self) -> None:
        if self.done is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


@dataclass(slots=True)
class Warm:
    """See `warm_ranks.py`."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="opdkit-warm-")))
    calls: Any = field(default_factory=itertools.count)
    process: Any = None

    def __post_init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        line = [sys.executable, str(Path(__file__).with_name("warm_ranks.py"))]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)
        atexit.register(self.process.communicate)
        assert self.hear() == "ready"

    def start(self, **job: Any) -> Started:
        number = next(self.calls)
        said = [self.folder / f"{number}.{name}" for name in ("out", "err")]
        self.process.stdin.write((json.dumps(job | {"out": str(said[0]), "err": str(said[1])}) + "\n").encode())
        return Started(self, self.hear()["pid"], said)

    def run(self, **job: Any) -> Done:
        started = self.start(**job)
        try:
            return started.wait()
        except BaseException:  # of a test that took too long
            started.kill()
            raise

    def hear(self, timeout: float | None = None) -> Any:
        if timeout is not None and not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        assert line, "the warm process has ended"
        return json.loads(line)


@functools.cache
def warm() -> Warm:
    return Warm()


def opdkit(*argv: object) -> Done:
    """`opdkit ...`"""
    return warm().run(argv=[*map(str, argv)])
