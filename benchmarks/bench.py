"""opdkit beside its peers, in one alternating run; writes docs/measurements/benchmarks.md and benchmarks/results/.

    make bench                     # within an hour on two idle cores
    make bench QUICK=--quick       # the same cases, smaller and fewer: within ten minutes
    make bench-compare             # fails where a ratio to a peer is 10 % above the last committed one

Every side of a case is a process of its own (`peers/worker.py`) with one thread. The sides of a case take turns, a run
each, until every one has had its runs (five; of long ones at least two); figures are medians, with the lowest and the
highest beside them. Ratios are of processor seconds, since a shared machine gives wall-clock by chance. What a peer
cannot do is kept as "did not run". Results are written case by case, so that an interrupted run keeps what it has:
`--only WORD` measures the cases whose name has it, and leaves the others' lines as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from peers import page
from peers.cases import Case, cases
from peers.compare import compare, write_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "triton")
ENOUGH_S = 20  # processor seconds that a side's runs took together: then two of them are enough
MEASURED = ("cpu_s", "wall_s", "system_s", "peak_mib")  # of each run
# One thread, asleep when it waits; nothing from a hub.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": f"{HERE}:{HERE.parent}",
}


class Side:
    """A worker process."""

    def __init__(self, case: Case, side: str) -> None:
        told = json.dumps({**case.arguments, "kind": case.kind, "side": side})
        self.log = (RESULTS / "last_worker.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", told],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=HERE,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        self.runs: list[dict[str, Any]] = []
        self.told = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        return {"failed": f"ended with status {self.process.wait()} and no word"}

    @property
    def failed(self) -> str | None:
        return self.told.get("failed")

    @property
    def has_enough(self) -> bool:
        return len(self.runs) > 1 and sum(run["cpu_s"] for run in self.runs) > ENOUGH_S

    def run(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        seen = self._read()
        if "failed" in seen:
            self.told = seen
        else:
            self.runs.append(seen)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()  # type: ignore[union-attr]
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


def measure(case: Case, runs: int) -> list[dict[str, Any]]:
    """A line for each side of the case."""
    if case.kind == "start":
        return [started(case, side, runs) for side in case.sides]
    sides = {name: Side(case, name) for name in case.sides}
    try:
        for _ in range(runs):
            for side in sides.values():
                if side.failed is None and not side.has_enough:
                    side.run()
    finally:
        for side in sides.values():
            side.close()
    return [line_of(case, name, side.told, side.runs) for name, side in sides.items()]


def started(case: Case, name: str, runs: int) -> dict[str, Any]:
    """A command from nothing to its end: its own processor seconds, and what it held at most."""
    found = []
    for number in range(runs + 1):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, *case.arguments["commands"][name]]
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        wall_s, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no reason given"]
            return line_of(case, name, {"failed": lines[-1][:200]}, [])
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if number:  # the first fills the disk's cache
            found.append({"cpu_s": cpu_s, "wall_s": wall_s})
    return line_of(case, name, {}, found)


def line_of(case: Case, side: str, told: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {"case": case.name, "group": case.group, "side": side, "sizes": case.shown}
    line |= {key: value for key, value in told.items() if key != "ready"}
    if "failed" in told or not runs:
        return line
    per = "answer_tokens" if "answer_tokens" in runs[0] else None  # rows end by chance: seconds a thousand tokens
    for key in ("cpu_s", "wall_s"):
        values = [run[key] / (run[per] / 1000 if per else 1) for run in runs]
        line |= {key: statistics.median(values), f"{key}_low": min(values), f"{key}_high": max(values)}
    if "system_s" in runs[0]:
        line["system_s"] = statistics.median(run["system_s"] for run in runs)
    if "peak_mib" in runs[0]:
        line["peak_mib"] = max(run["peak_mib"] for run in runs)
    line |= {key: value for key, value in runs[-1].items() if key not in MEASURED}
    return {**line, "runs": len(runs)}


def about(quick: bool) -> dict[str, Any]:
    """Where and with what this was measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "quick": quick,
    }


def run(args: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("quick.jsonl" if args.quick else "bench.jsonl")
    chosen = [case for case in cases(quick=args.quick) if args.only is None or args.only in case.name]
    told, begun = about(args.quick), time.monotonic()
    for number, case in enumerate(chosen, 1):
        lines = measure(case, 5)
        for line in lines:
            line |= {"load": round(os.getloadavg()[0], 1), "commit": told["commit"]}
        write_results(path, told, lines)
        said = [f"{line['side']} {line.get('failed') or format(line['cpu_s'], '.3g') + ' s'}" for line in lines]
        minutes = (time.monotonic() - begun) / 60
        print(f"[{number}/{len(chosen)}, {minutes:.1f} min] {case.name}: {'; '.join(said)}", flush=True)
    page.write(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--quick", action="store_true")
    runner.add_argument("--only", help="cases whose name has this word")
    runner.set_defaults(do=run)
    commands.add_parser("page").set_defaults(do=lambda args: page.write(RESULTS))
    commands.add_parser("compare").set_defaults(do=lambda args: sys.exit(compare(RESULTS)))
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
