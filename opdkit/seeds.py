"""One recipe with several seeds, and how far apart the results are: `opdkit train RECIPE --seeds 0-4`.

A seed changes which problems come when and which answers are sampled, those of evaluations too. So the spread over
seeds holds the noise of training and of sampling; a run's own interval is about other problems, which all seeds share.
The two do not contain each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.run.console import Console, Table, say
from opdkit.run.folder import RunFolder, write_json
from opdkit.training.saved.resume import LAST_BITS, check_same_recipe

MOST_SEEDS = 1000


def seeds_of(text: str) -> list[int]:
    """ "0-4" or "1,5,7". Raises UserError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds {text}: write numbers, as 0-4 or 1,5,7")
        numbers = range(int(first), int(last or first) + 1)
        if len(found) + len(numbers) > MOST_SEEDS:
            raise UserError(f"--seeds {text}: more than {MOST_SEEDS} runs")
        found += numbers
    if len(set(found)) < max(2, len(found)):
        raise UserError(f"--seeds {text}: name two seeds or more, each once")
    return found


def settings_of(recipe: Recipe, seed: int) -> list[str]:
    """What is another one in the run of a seed."""
    return [f"seed={seed}", f'name="{recipe.name}-seed{seed}"']


def is_finished(recipe: Recipe) -> bool:
    """Whether there is nothing left to do in the recipe's folder. Raises UserError for a run of another recipe."""
    folder = RunFolder(recipe.run_dir)
    if not (folder.summary.exists() and folder.has_begun):
        return False
    summary = folder.read_summary()
    changed = check_same_recipe(folder.read_recipe(), recipe.as_dict(), steps_taken=summary["steps"])
    is_over = summary["steps"] == recipe.train.steps or "ended" in summary
    return is_over and changed.keys() <= set(LAST_BITS)  # what goes by the device is not in a recipe's file


def report_seeds(recipe: Recipe, seeds: Sequence[int], runs: Sequence[Path], console: Console) -> Path:
    """Write `<name>-seeds.json` beside the runs, and say what it holds."""
    found = {
        "name": recipe.name,
        "seeds": list(seeds),
        "runs": [run.name for run in runs],
        "eval": spread([RunFolder(run).read_summary() for run in runs]),
    }
    path = recipe.run_dir.with_name(f"{recipe.name}-seeds.json")
    write_json(path, found)
    say(console, _table(found, len(seeds)), f"spread over seeds: {path}")
    return path


def spread(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Who ("student_before", "student_after", "gain") -> data set -> what avg@n of the runs is together: `values`,
    their `mean`, `sd` (of one run; n - 1), `low` and `high` (the smallest and the largest), and `interval`, half the
    mean width of the runs' own 95 % intervals over problems. None: not known."""
    before, after = ([_avg(one, who) for one in summaries] for who in ("student_before", "student_after"))
    names = list(dict.fromkeys(name for one in after for name in one))
    found: dict[str, dict[str, dict[str, Any]]] = {"student_before": {}, "student_after": {}, "gain": {}}
    for name in names:
        own = {"student_before": [one.get(name) for one in before], "student_after": [one.get(name) for one in after]}
        for who, estimates in own.items():
            widths = [e["high"] - e["low"] for e in estimates if e and None not in (e["low"], e["high"])]
            values = [e["value"] if e else None for e in estimates]
            found[who][name] = {**_together(values), "interval": fmean(widths) / 2 if widths else None}
        gains = [
            None if b is None or a is None or None in (b["value"], a["value"]) else a["value"] - b["value"]
            for b, a in zip(*own.values(), strict=True)
        ]
        found["gain"][name] = {**_together(gains), "interval": None}
    return found


def _avg(summary: Mapping[str, Any], who: str) -> dict[str, Mapping[str, Any]]:
    return {name: measured["avg_at_n"] for name, measured in (summary["eval"].get(who) or {}).items()}


def _together(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "values": list(values),
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def _table(found: Mapping[str, Any], num: int) -> Table:
    headers = ("", "data", "mean", "sd", "smallest", "largest", "± problems")
    table = Table(*headers, title=f"{found['name']}: avg@n of {num} seeds")
    words = {"student_before": "before", "student_after": "after", "gain": "gain"}
    for who, sets in found["eval"].items():
        for name, one in sets.items():
            numbers = (one[key] for key in ("mean", "sd", "low", "high", "interval"))
            table.add_row(words[who], name, *("" if value is None else f"{value:.3f}" for value in numbers))
    return table
