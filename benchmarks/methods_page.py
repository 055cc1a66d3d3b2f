"""The page of `methods.py`: docs/measurements/methods_table.md, made from the results that are there."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

HEAD = """\
# Every method on one task

Made by `python benchmarks/methods.py` on {machine}.
Do not edit it: what was found, and why, is in [methods.md](methods.md).

The task is `arithmetic:add-3` (`066+784=` -> `6+4+0=10,6+8+1=15,0+7+1=08:0850`). The student is half taught to add and
uses demonstrations well. Every arm starts from it and learns from {steps} steps of {answers} answers to 1024
problems, which the seed chooses, as it does their order, the answers and the peers. What an arm changes beside its
method's defaults is in `benchmarks/methods.py`; learning rates were chosen by hand, on another seed.

Accuracy is that of one sampled answer (temperature 1), 2 answers to each of 512 held-out problems, with the 95 %
interval over problems.
"""

AFTER_TABLE = """
**better**: in every seed the interval after lies above the interval before; **worse**: below, in every seed.
**tokens**: of the answers that were trained on, in thousands; sampled, but for the solutions of `sft`. **processor s**:
of the whole arm, loading, training and evaluation. **peak**: memory of the whole process, libraries included.
"""

READING = """
## What the student can do with what a teacher reads

The frozen student, before training, on 96 held-out problems, 8 answers each. Contexts are built from these answers as
in a training step of `mopd` (right, right, wrong; groups that lack one show what they have). **share**: how often
`mopd` shows just that. **accuracy**: of one sampled answer after reading it. **right token**: the probability of the
right next token at the place where a wrong answer of the student first goes wrong. **alone**: the same for the same
problems and answers, reading nothing (what is shown depends on how hard a problem is).

| shown | share | accuracy | alone | right token | alone |
|---|---|---|---|---|---|
"""


class Arm(Protocol):
    @property
    def method(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def about(self) -> str: ...


def write_page(path: Path, arms: Mapping[str, Arm], results: Iterable[tuple[str, int | None, dict[str, Any]]]) -> None:
    """Arms that are not there are missing from the page, and the page says which."""
    found: dict[str, dict[int | None, dict[str, Any]]] = {}
    for name, seed, result in results:
        found.setdefault(name, {})[seed] = result
    models = found["models"][None]
    runs = {name: {seed: r for seed, r in found[name].items() if seed is not None} for name in arms if name in found}
    seeds = sorted({seed for of_arm in runs.values() for seed in of_arm})
    train = next(iter(next(iter(runs.values())).values()))["of"]["recipe"]
    answers = train["train"]["problems_per_step"] * train["sampling"]["group_size"]
    text = HEAD.format(machine=_machine(), steps=train["train"]["steps"], answers=answers)
    absent = [f"{name} {seed}" for name in arms for seed in seeds if seed not in runs.get(name, {})]
    if absent:
        text += f"\nNot run yet: {', '.join(absent)}.\n"
    text += "\n| arm | lr | " + " | ".join(f"seed {seed}" for seed in seeds)
    text += " | mean | | tokens, thousands | processor s | peak MiB |\n|---" + "|---" * (len(seeds) + 6) + "|\n"
    for label, kind in (("**the student, before**", "student"), ("the external teacher", "teacher")):
        text += f"| {label} | | {_with_interval(models[kind])} |{' |' * (len(seeds) + 4)}\n"
    for name, of_arm in runs.items():
        arm = arms[name]
        label = f"`{arm.method}`" + (f" ({arm.about})" if arm.about else "")
        text += f"| {label} | {arm.lr:g} | {_row(of_arm, seeds, models['student'])} |\n"
    text += AFTER_TABLE
    if "reading" in found:
        text += READING + "".join(_reading_row(row) for row in found["reading"][None]["rows"])
    path.write_text(text, encoding="utf-8")


def _row(results: Mapping[int, dict[str, Any]], seeds: Sequence[int], before: dict[str, Any]) -> str:
    values = [result["accuracy"]["avg_at_n"]["value"] for result in results.values()]
    tokens = [result["tokens"]["answer"] / 1000 for result in results.values()]
    seconds = [result["cpu_s"] for result in results.values() if not result["resumed"]]  # a resumed one knows a part
    cells = [_with_interval(results[seed]) if seed in results else "-" for seed in seeds]
    cells += [f"**{_mean(values):.3f}**", _verdict(list(results.values()), before), f"{_mean(tokens):.0f}"]
    cells += [f"{_mean(seconds):.0f}" if seconds else "-", f"{max(r['peak_mib'] for r in results.values()):.0f}"]
    return " | ".join(cells)


def _with_interval(result: Mapping[str, Any]) -> str:
    estimate = result["accuracy"]["avg_at_n"]
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _verdict(after: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> str:
    was = before["accuracy"]["avg_at_n"]
    now = [result["accuracy"]["avg_at_n"] for result in after]
    better, worse = sum(e["low"] > was["high"] for e in now), sum(e["high"] < was["low"] for e in now)
    for word, count in (("better", better), ("worse", worse)):
        if count == len(now):
            return word
    return f"better in {better}, worse in {worse} of {len(now)}"


def _reading_row(row: Mapping[str, Any]) -> str:
    keys = ("share", "accuracy", "accuracy_alone", "right_token", "right_token_alone")
    numbers = [row[key] for key in keys]
    return f"| {row['shown']} | " + " | ".join("-" if n is None else f"{n:.3f}" for n in numbers) + " |\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"one core of {cpu}, torch {torch.__version__}, one thread"
