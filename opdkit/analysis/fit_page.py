"""What `opdkit fit` prints: the verdict, the findings, the numbers behind them, and the keys to set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkit.measure.fit import Advice, Level, Verdict
from opdkit.measure.fit_facts import Facts
from opdkit.recipe import Recipe
from opdkit.run.console import Console, Line, Table, say

COLOUR: dict[Verdict, str] = {
    "go": "green", "cold_start": "yellow", "align": "yellow", "unclear": "yellow", "no_gain": "red",
}  # fmt: skip
LEVEL_COLOUR: dict[Level, str] = {
    "good": "green", "note": "cyan", "warn": "yellow", "stop": "red", "unknown": "dim",
}  # fmt: skip
BAR_WIDTH = 30


def print_page(console: Console, recipe: Recipe, facts: Facts, advice: Advice, written: Path) -> None:
    verdict = (advice.verdict, f"bold {COLOUR[advice.verdict]}")
    say(console, "", Line(verdict, f"  {advice.sentence}"), "")
    say(console, _findings(advice))
    say(console, _numbers(facts))
    if facts.pass_rates:
        say(console, "", "Problems by how often the student solves them")
        for line in _histogram(facts.pass_rates):
            say(console, f"  {line}")
    if facts.continuations:
        say(console, _continuations(facts))
    for line in _next_steps(recipe, advice):
        say(console, line)
    say(console, "", f"wrote {written}")


def _findings(advice: Advice) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in advice.findings:
        table.add_row(Line((finding.level, LEVEL_COLOUR[finding.level])), finding.topic, finding.sentence)
    return table


def _numbers(facts: Facts) -> Table:
    table = Table("", "all tokens", "first token", title="\nBoth models on the student's answers", title_justify="left")
    for name, title in (
        ("ratio", f"overlap ratio of the {facts.k} likeliest"),
        ("mass_student", "overlap mass, student"),
        ("mass_teacher", "overlap mass, teacher"),
        ("advantage", "overlap-token advantage (paper)"),
        ("top1_agreement", "same likeliest token"),
        ("student_entropy", "entropy of the student, nats"),
        ("teacher_entropy", "entropy of the teacher, nats"),
        ("entropy_gap", "entropy gap, nats"),
        ("reverse_kl", "KL(student || teacher), nats"),
        ("forward_kl", "KL(teacher || student), nats"),
    ):
        table.add_row(title, _number(facts.overlap[name]), _number(facts.first_token[name]))
    return table


def _histogram(rates: Sequence[float]) -> list[str]:
    """A line for each number of right answers that occurs, as a share of the answers."""
    counts = {rate: sum(r == rate for r in rates) for rate in sorted(set(rates))}
    longest = max(counts.values())
    return [
        f"{100 * rate:3.0f} %  {'█' * max(1, round(BAR_WIDTH * count / longest))} {count}"
        for rate, count in counts.items()
    ]


def _continuations(facts: Facts) -> Table:
    table = Table(
        "from token", "teacher's reward minus the student's", "answers",
        title="\nThe teacher goes on from the student's first tokens", title_justify="left",
    )  # fmt: skip
    for continuation in facts.continuations:
        found = continuation.advantage
        interval = "" if found["low"] is None else f"  [{found['low']:+.3f}, {found['high']:+.3f}]"
        value = "unknown" if found["value"] is None else f"{found['value']:+.3f}"
        table.add_row(str(continuation.prefix_tokens), f"{value}{interval}", str(continuation.num_answers))
    return table


def _next_steps(recipe: Recipe, advice: Advice) -> list[str]:
    lines = []
    if advice.recipe:
        settings = " ".join(f"--set {key}={_toml(value)}" for key, value in advice.recipe.items())
        lines += ["", f"Suggested: {settings}"]
    if advice.verdict == "cold_start" and recipe.teacher.kind == "model" and recipe.teacher.tokens == "same":
        lines += [
            "",
            "Cold start: opdkit train RECIPE --set method.name=sft --set method.answers=teacher "
            f"--set name={recipe.name}-cold-start, then train from its last checkpoint (--set model.path=...).",
        ]
    return lines


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
