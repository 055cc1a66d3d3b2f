"""One side of one case, in a process of its own: `bench.py` says "run", this says what it took.

    python -m peers.worker '{"kind": "loss", "side": "trl", ...}'

Seconds are the processor's (all threads of this process), of these the kernel's, and the wall's. Memory is what the
process came to hold beyond what it held when the run began: the kernel's high-water mark, reset before each run, so
that it includes whatever any library allocates. A side that cannot be imported, built or run says why, in one line.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


class Meter:
    """What happens between `begin` and `end`."""

    def begin(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark becomes what is held now
        self.held_kib = status_kib("VmRSS")
        self.cpu_s, self.wall_s, self.system_s = time.process_time(), time.perf_counter(), os.times().system

    def end(self) -> dict[str, float]:
        cpu_s, wall_s = time.process_time() - self.cpu_s, time.perf_counter() - self.wall_s
        system_s = os.times().system - self.system_s
        peak_mib = (status_kib("VmHWM") - self.held_kib) / 1024
        return {"cpu_s": cpu_s, "wall_s": wall_s, "system_s": system_s, "peak_mib": peak_mib}


def status_kib(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])


class Talk:
    """With the driver: JSON lines out, words in. What libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, told: dict[str, Any]) -> None:
        print(json.dumps(told), file=self._out, flush=True)

    def wait(self) -> bool:
        """Until the driver asks for a run; False: there are no more."""
        return sys.stdin.readline().strip() == "run"


# What a case's `prepare` gives: a function to be measured (what it returns is told beside the measurement), and what is
# told once. Or, for a side that has a loop of its own, a function that takes Meter and Talk and runs it.
Prepared = tuple[Callable[[], dict[str, Any] | None], dict[str, Any]]


def serve(case: dict[str, Any], talk: Talk) -> None:
    module = importlib.import_module(f"peers.{case['kind']}")
    meter = Meter()
    if hasattr(module, "drive") and case["side"] != "opdkit":
        module.drive(case, meter, talk)
        return
    run, told = module.prepare(case)
    run()  # warms up: kernels are compiled and caches filled
    talk.say({"ready": True, **told})
    while talk.wait():
        meter.begin()
        seen = run() or {}
        talk.say({**meter.end(), **seen})


def main() -> None:
    talk = Talk()
    try:
        serve(json.loads(sys.argv[1]), talk)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no reason given"]
        talk.say({"failed": f"{type(error).__name__}: {lines[0][:200]}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
