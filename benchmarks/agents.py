"""Whether a student learns to call a tool, beside the same student without it and by reward alone, with three seeds.

    python benchmarks/agents.py           seeds 0, 1 and 2: `opdkit quickstart --agent --whole --seed SEED` of each
    python benchmarks/agents.py 3 4       others, beside those that are kept
    python benchmarks/agents.py page      only the table of docs/measurements/agents.md, from what is kept

Every arm is scored on the same 512 held-out problems, one sampled episode each. Of a seed: the interval over problems
(95 %). Of the seeds: their mean, with Student's interval, which three seeds make wide.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "agents.jsonl"
PAGE = HERE.parent / "docs" / "measurements" / "agents.md"
SEEDS = (0, 1, 2)
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's 97.5 % point, by seeds

_TABLE = re.compile(r"(<!-- agents.py -->\n).*?(<!-- end -->)", re.DOTALL)


def main(words: list[str]) -> None:
    if words != ["page"] and not all(word.isdigit() for word in words):
        sys.exit(__doc__)
    for seed in [] if words == ["page"] else words or SEEDS:
        _keep(_run(int(seed)))
    _write_page()


def _write_page() -> None:
    table = _table([json.loads(line) for line in RESULTS.read_text().splitlines()])
    PAGE.write_text(_TABLE.sub(lambda found: f"{found[1]}{table}{found[2]}", PAGE.read_text()), encoding="utf-8")


def _run(seed: int) -> dict[str, Any]:
    from opdkit.quickstart import quickstart
    from opdkit.quickstart_agent import WHOLE_AGENT
    from opdkit.run.console import Console

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "agent"
        summary = quickstart(out, kind=WHOLE_AGENT, seed=seed, console=Console())
    arms = {name: arm["eval"] for name, arm in summary["arms"].items()}
    named = {"teacher": summary["eval"]["teacher"], "before": summary["eval"]["student_before"]}
    begun = {f"{name}_before": arm["before"] for name, arm in summary["arms"].items() if "before" in arm}
    named |= {"opd": summary["eval"]["student_after"], **begun, **arms}
    return {
        "seed": seed,
        "labels": {name: arm["label"] for name, arm in summary["arms"].items()},
        "scores": {name: next(iter(one.values()))["avg_at_n"] for name, one in named.items()},
        "cpu_s": time.process_time() - started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _keep(result: dict[str, Any]) -> None:
    """In place of an earlier one of the seed."""
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    kept = sorted([*(one for one in known if one["seed"] != result["seed"]), result], key=lambda one: one["seed"])
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")


def _table(results: list[dict[str, Any]]) -> str:
    labels = {"teacher": "the teacher", "before": "the student before", "opd": "**after OPD**"}
    for name, label in results[0]["labels"].items():
        if f"{name}_before" in results[0]["scores"]:
            labels[f"{name}_before"] = f"before {label}"
        labels[name] = f"after {label}"
    heads = ["", *(f"seed {one['seed']}" for one in results), "mean"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, label in labels.items():
        scores = [one["scores"][name] for one in results]
        cells = [f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for score in scores]
        lines.append(f"| {label} | {' | '.join(cells)} | {_mean([score['value'] for score in scores])} |")
    seconds = [f"{one['cpu_s']:.0f}" for one in results if one["cpu_s"]]
    took = f"; {', '.join(seconds)} s of processor time" if seconds else ""
    return "\n".join([*lines, "", f"{results[0]['machine']}{took}.", ""])


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = _T[len(values)] * spread / math.sqrt(len(values))
    return f"{mean:.3f} [{max(0.0, mean - half):.3f}, {min(1.0, mean + half):.3f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
