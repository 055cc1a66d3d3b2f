"""A process that has everything imported and runs `opdkit` command lines, each in a fork of its own.

What a fork does is what `opdkit ...` does, from the reading of its arguments on; only the start of an interpreter and
the imports are not repeated. Jobs come on standard input as lines of JSON, and so does what became of them on standard
output. `file_events.c` is preloaded and armed in the fork alone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

EAGER = (
    "opdkit.cli", "opdkit.training.loop", "opdkit.pipeline", "opdkit.evaluation.evaluate", "opdkit.evaluation.sample",
    "opdkit.reporting", "opdkit.training.saved.export", "peft", "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation", "pyarrow.parquet", "pandas", "numpy.ma",
    "opdkit.losses.weights", "opdkit.losses.coefficients", "opdkit.reporting.page", "dateutil.parser",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed command leaves behind comes to us, and is counted
    arm = libc.file_events_arm
    arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    for name in EAGER:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen3")  # takes a quarter of a run, and is kept
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            os._exit(run(job, arm))
        if job.get("kill_after") is not None:
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, ended, used = os.wait4(child, 0)
        told = {"status": os.waitstatus_to_exitcode(ended), "orphans": orphans()}
        print(json.dumps(told | {"seconds": used.ru_utime + used.ru_stime}), file=answers, flush=True)


def run(job: dict[str, Any], arm: Any) -> int:
    """In the fork. Returns the exit status."""
    os.setsid()
    os.chdir(job["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job.get("env", {}))
    if job.get("uid"):
        os.setuid(job["uid"])
    if below := job.get("below"):
        log = -1 if job.get("log") is None else os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        arm(below.encode(), job.get("nth", 0), job.get("error", 0), job.get("stays", 0), log)
    if "clock_back" in job:
        ctypes.CDLL(None).file_events_clock(ctypes.c_long(job["clock_back"]), ctypes.c_long(job["looks"]))
    from opdkit import cli

    sys.argv = ["opdkit", *job["argv"]]
    try:
        cli.main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return 0 if code is None else code if isinstance(code, int) else 1


def orphans() -> int:
    """How many processes of ended commands are still there after ten seconds; they are ended then."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        except ChildProcessError:
            return 0
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        left = [int(pid) for pid in file.read().split()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(left)


if __name__ == "__main__":
    main()
