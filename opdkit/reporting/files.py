"""Files of a run, which a stranger may have made; the lines of metrics.jsonl, as far as they are written; who writes.

What is no line of metrics is counted, and left out.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkit.errors import UserError

_OWNER = re.compile(r"process (\d+) on (\S+) since")  # what `run/lock.py` writes into .lock
SILENT_S = 1800.0  # a writer on another host is taken for gone after this long without a new line
MOST_STEPS = 2**53  # from here on a number of steps is no exact float, and no run is so long


def checked(path: Path, most_bytes: int = 1 << 30) -> Path:
    """The path of an ordinary file. Raises FileNotFoundError, or UserError for what would hang or fill the memory."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no file")
    if status.st_size > most_bytes:
        raise UserError(f"{path} has {status.st_size:,} bytes, and at most {most_bytes:,} are read")
    return path


@dataclass(slots=True)
class MetricLines:
    """The lines of a growing metrics.jsonl. Half a line waits for its rest; a file that was cut (--resume) or replaced
    (--overwrite) is read anew."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    num_broken: int = 0
    first_broken: int = 0  # its number, from 1
    rest: int = 0  # bytes behind the last whole line
    _num_lines: int = 0
    _file: tuple[int, int] = (0, 0)  # inode, bytes read
    _last: bytes = b""  # the last line that was read

    def read(self) -> bool:
        """Read what is new; whether anything was. Raises UserError for a pipe, a folder, a file that is too large."""
        try:
            checked(self.path)
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                inode, done = self._file
                if inode != status.st_ino or status.st_size < done or not self._still_there(file.fileno()):
                    self._forget()
                    done = 0
                file.seek(done)
                new = file.read()
        except FileNotFoundError:
            had = bool(self.lines)
            self._forget()
            return had
        whole = new[: new.rfind(b"\n") + 1]
        self.rest = len(new) - len(whole)
        self._file = (status.st_ino, done + len(whole))
        for raw in whole.splitlines(keepends=True):
            self._add(raw)
            self._last = raw
        return bool(whole)

    def _still_there(self, descriptor: int) -> bool:
        """Whether the last line that was read stands where it was: a resumed run may have cut it and grown past it."""
        return not self._last or os.pread(descriptor, len(self._last), self._file[1] - len(self._last)) == self._last

    def _forget(self) -> None:
        self.lines, self.num_broken, self.first_broken, self._num_lines = [], 0, 0, 0
        self._file, self._last = (0, 0), b""

    def _add(self, raw: bytes) -> None:
        self._num_lines += 1
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and abs(line["step"]) < MOST_STEPS:
            self.lines.append(line)
        else:
            self.num_broken += 1
            self.first_broken = self.first_broken or self._num_lines

    def damage(self, *, ended: bool) -> str | None:
        """What is wrong with the file, in a sentence. ended: nobody is writing the rest of a last line."""
        said = []
        if self.num_broken == 1:
            said.append(f"line {self.first_broken:,} of {self.path.name} is no line of metrics and is left out")
        elif self.num_broken:
            which = f"(the first is line {self.first_broken:,})"
            said.append(f"{self.num_broken:,} lines of {self.path.name} are not metrics and are left out {which}")
        if self.rest and ended:
            said.append(f"{self.path.name} ends in the middle of a line, which is left out")
        return "; ".join(said) + "." if said else None


def writer_lives(folder: Path) -> bool:
    """Whether the process that the lock names is there. It empties the file when it ends; kill -9 leaves the name."""
    try:
        owner = _OWNER.match(checked(folder / ".lock", 4096).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return False
    if owner is None:
        return False
    if owner[2] != socket.gethostname():  # cannot be asked: believed while the run grows
        newest = max((path.lstat().st_mtime for path in folder.iterdir()), default=0.0)
        return time.time() - newest < SILENT_S
    try:
        os.kill(int(owner[1]), 0)
    except (ProcessLookupError, OverflowError):  # a stranger's number may be none of a process
        return False
    except PermissionError:
        pass
    return True
