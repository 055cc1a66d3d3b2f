"""What was measured, kept as a line for each figure; and whether it got worse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WORSE = 1.10  # a ratio to a peer may rise by so much
Lines = list[dict[str, Any]]


def read(text: str) -> tuple[dict[str, Any], Lines]:
    """(where it was measured, a line for each figure)."""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return (lines[0]["about"], lines[1:]) if lines else ({}, [])


def write_results(path: Path, about: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """These lines in the place of those of the same case; the others stay, each with what it was measured under."""
    _, kept = read(path.read_text(encoding="utf-8")) if path.exists() else ({}, [])
    measured = {line["case"] for line in lines}
    whole = [{"about": about}, *(line for line in kept if line["case"] not in measured), *lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")


def ratios(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(case, peer) -> opdkit's processor seconds over the peer's."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if "cpu_s" in line:
            found.setdefault(line["case"], {})[line["side"]] = line["cpu_s"]
    return {
        (case, side): sides["opdkit"] / seconds
        for case, sides in found.items()
        if "opdkit" in sides
        for side, seconds in sides.items()
        if side != "opdkit"
    }


def compare(folder: Path) -> str | int:
    """0, or what got worse: every result against the last committed one that differs from it."""
    worse, compared = [], 0
    for path in sorted(folder.glob("*.jsonl")):
        before = _committed(path)
        if before is None:
            print(f"{path.name}: nothing committed to compare with")
            continue
        old, new = ratios(read(before)[1]), ratios(read(path.read_text(encoding="utf-8"))[1])
        for key in sorted(old.keys() & new.keys()):
            compared += 1
            if new[key] > old[key] * WORSE:
                worse.append(f"{path.name}: {key[0]}, to {key[1]}: {old[key]:.2f} -> {new[key]:.2f}")
        worse += [
            f"{path.name}: {case}, to {side}: no longer measured" for case, side in sorted(old.keys() - new.keys())
        ]
    if worse:
        return "\n".join(
            [f"{len(worse)} of {compared} ratios are more than 10 % above the last committed ones:", *worse]
        )
    print(f"{compared} ratios, none more than 10 % above the last committed one")
    return 0


def _committed(path: Path) -> str | None:
    """The file as it was last committed with other content."""
    now = path.read_text(encoding="utf-8")
    asked = ["git", "log", "--format=%H", "-n", "2", "--", path.name]
    commits = subprocess.run(asked, capture_output=True, text=True, cwd=path.parent).stdout.split()
    for commit in commits:
        shown = subprocess.run(
            ["git", "show", f"{commit}:./{path.name}"], capture_output=True, text=True, cwd=path.parent
        )
        if shown.returncode == 0 and shown.stdout != now:
            return shown.stdout
    return None
