"""Every check of a recipe, and the page that they make."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.doctor.checks import CHECKS, examine
from opdkit.doctor.findings import LEVELS, Examined, Level
from opdkit.doctor.parts import side_by_side
from opdkit.doctor.patient import Dose, Patient
from opdkit.recipe import Recipe
from opdkit.run.console import Bar, Console, Line, say

COLOUR: dict[Level, str] = {"failed": "bold red", "warned": "yellow", "not checked": "cyan", "passed": "green"}
MOST_DETAILS, MOST_CHARACTERS = 5, 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    recipe: str
    examined: Sequence[Examined]
    read: Sequence[dict[str, str]]  # what each reader reads of one row
    seconds: float

    @property
    def has_failed(self) -> bool:
        return any(one.finding.level == "failed" for one in self.examined)

    def count(self, level: Level) -> int:
        return sum(one.finding.level == level for one in self.examined)

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "healthy": not self.has_failed,
            "seconds": self.seconds,
            "counts": {level: self.count(level) for level in LEVELS},
            "checks": [one.as_dict() for one in self.examined],
            "views": [*self.read],
        }


def doctor(recipe: Recipe, dose: Dose, *, console: Console) -> Diagnosis:
    """Ask every check. Nothing of a run is written. Raises only what is not about the recipe (Ctrl-C)."""
    started, found = time.monotonic(), []
    with Patient(recipe, dose, console) as patient, Bar(console, "doctor", len(CHECKS)) as bar:
        for one in examine(patient):
            found.append(one)
            bar.update(len(found), note=one.name)
        read = side_by_side(patient)
    return Diagnosis(recipe=recipe.name, examined=found, read=read, seconds=time.monotonic() - started)


def print_page(console: Console, found: Diagnosis) -> None:
    """One page, the worst first."""
    if found.read:
        say(console, "What is read of one row:")
        for read in found.read:
            say(console, Line("  ", (read["reader"], "bold"), f"  {_short(read['text'])!r}"))
        say(console, "")
    for level in LEVELS[::-1]:
        for one in found.examined:
            if one.finding.level == level:
                _print(console, one)
    counts = ", ".join(f"{found.count(level)} {level}" for level in LEVELS[::-1])
    style = "bold red" if found.has_failed else "green" if not found.count("warned") else "yellow"
    say(console, "", f"{found.recipe}: {counts}; {found.seconds:.0f} s", style=style)


def _print(console: Console, one: Examined) -> None:
    finding = one.finding
    say(
        console, Line((f"{finding.level:<11}", COLOUR[finding.level]), " ", (one.name, "bold"), f": {finding.sentence}")
    )
    for line in finding.details[:MOST_DETAILS]:
        say(console, f"            {_short(line)}")
    if len(finding.details) > MOST_DETAILS:
        say(console, f"            and {len(finding.details) - MOST_DETAILS} more lines (--json has all)")
    if finding.fix:
        say(console, Line("            ", ("do: ", "bold"), finding.fix))


def _short(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
