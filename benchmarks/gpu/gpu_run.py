"""Runs the parts of `gpu_parts.py` one after another, each in a process of its own with a limit of its own.

A figure is a JSON line, written when it is known: a part that fails, hangs or is cut off loses only what it had not
said yet, and gets a line that says so. All parts together end within `TOTAL_S`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOTAL_S = 470
# In order of what would be missed most; seconds.
LIMITS = {
    "products": 20,
    "head": 50,
    "step": 110,
    "decode": 70,
    "passes": 45,
    "long": 60,
    "equal": 40,
    "draw": 30,
    "repeat": 25,
    "resume": 60,
    "tests": 150,
}


def hardware(device: str) -> dict[str, Any]:
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    if device == "cpu":
        return {"device": f"cpu, {os.cpu_count()} cores", **found}
    properties = torch.cuda.get_device_properties(0)
    memory = round(properties.total_memory / 2**30, 1)
    return {"device": properties.name, "memory_gib": memory, "cuda": torch.version.cuda, **found}


def run_part(name: str, arguments: list[str], limit: float) -> list[dict[str, Any]]:
    """The figures that a part came to, and how it ended."""
    started = time.monotonic()
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, said = process.communicate(timeout=limit)
        end = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        end = f"cut off after {limit:.0f} s"
    figures = []
    for line in out.splitlines():
        try:
            figures.append(json.loads(line))
        except ValueError:  # what a library prints, or a line that was cut in two
            said += f"\n{line}"
    last: dict[str, Any] = {
        "part": name,
        "figure": "ended",
        "how": end,
        "seconds": round(time.monotonic() - started, 1),
    }
    if end != "done":
        last["said"] = said.strip()[-1500:]
    return [*figures, last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="of every part's limit, for slow machines")
    asked = parser.parse_args()
    if asked.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu.sh needs a CUDA device, and torch finds none; --device cpu --tiny shows that the script runs")
    about = hardware(asked.device)
    arguments = ["--device", asked.device, *(["--tiny"] if asked.tiny else [])]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + TOTAL_S * asked.limit_factor, []
    with asked.out.open("w", encoding="utf-8") as file:
        for name in asked.only:
            left = end - time.monotonic()
            limit = min(LIMITS[name] * asked.limit_factor, left)
            figures = [{"part": name, "figure": "ended", "how": "left out: no time was left"}]
            if left > 5:
                figures = run_part(name, arguments, limit)
            for figure in figures:
                line = json.dumps({**figure, **about})
                print(json.dumps(figure), flush=True)
                file.write(line + "\n")
                file.flush()
            if figures[-1]["how"] != "done":
                failed.append(name)
    sys.exit(f"not whole: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
