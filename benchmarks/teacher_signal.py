"""Time of `opdkit analyse signal --steps metrics,plots` on a set of usual size: all conditions, all sample sets.

    python benchmarks/teacher_signal.py                  # 300 problems, 8 answers each: under a minute on a busy core
    python benchmarks/teacher_signal.py --problems 1000

Scores are drawn; everything else is what the command does: scores.jsonl is read, every metric of every condition,
sample set and difficulty gets its interval, so does every difference of two conditions, and metrics.json, metrics.csv,
report.md and both figures are written.
Processor seconds of this process (a shared machine gives wall-clock by chance), and wall-clock beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opdkit.analysis.signal.conditions import CONDITIONS
from opdkit.analysis.signal.parts import SCORES_FILE, write_part
from opdkit.analysis.signal.results import write_metrics, write_plots
from opdkit.measure.signal import RESAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--answers", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows = write_scores(folder, asked.problems, asked.answers)
        print(
            f"{asked.problems} problems x {asked.answers} answers x {len(CONDITIONS)} conditions = {num_rows:,} scores"
        )
        timed("metrics", lambda: write_metrics(folder, definitions="careful", seed=0, resamples=RESAMPLES))
        timed("plots", lambda: write_plots(folder))


def timed(step: str, run: Callable[[], object]) -> None:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    print(
        f"{step}: {time.process_time() - processor:.1f} s of processor, {time.perf_counter() - wall:.1f} s on the clock"
    )


def write_scores(folder: Path, num_problems: int, num_answers: int) -> int:
    """scores.jsonl as the command writes it, of a teacher that prefers right answers a little."""
    rng = np.random.default_rng(0)
    rows = []
    for problem in range(num_problems):
        success = rng.random(num_answers) < rng.random()
        for condition in CONDITIONS:
            effective = bool(rng.random() < 0.8)
            for sample, right in enumerate(success.tolist()):
                rows.append(
                    {
                        "condition": condition,
                        "problem_id": f"problem-{problem}",
                        "sample_id": sample,
                        "score": float(rng.normal(0.3 * right - 1.0, 0.4)),
                        "reward": float(right),
                        "success": right,
                        "num_successes": int(success.sum()),
                        "num_answers": num_answers,
                        "effective": effective,
                        "num_context_tokens": 1000,
                        "num_truncated_tokens": 0,
                        "copy": bool(rng.random() < 0.2),
                    }
                )
    contexts = {
        "identity": {"design": "fixed", "context": {}},
        "template": {},
        "shows": {name: condition.shows for name, condition in CONDITIONS.items()},
        "answers": {"path": "drawn"},
        "counts": {"problems": num_problems, "answers_scored": num_problems * num_answers},
    }
    identity = {"model": "drawn", "model_files": None, "dtype": "float32"}
    write_part(folder / SCORES_FILE, {"identity": identity, "num_lines": len(rows), "contexts": contexts}, rows)
    return len(rows)


if __name__ == "__main__":
    main()
