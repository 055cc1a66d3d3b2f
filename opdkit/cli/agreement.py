"""Commands that have two models read the same answers: `opdkit analyse overlap` and `opdkit analyse position`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opdkit.cli.analysis import analyse_app
from opdkit.cli.base import MANY, MOST, Device, Seed, TrustRemoteCode, console
from opdkit.errors import Interrupted
from opdkit.run.console import Table, say

Sources = Annotated[
    list[Path], typer.Argument(help="Run folders, files of rows, or token tables; several are compared.")
]
Student = Annotated[str | None, typer.Option(help="Another student than the run's last checkpoint.")]
TeacherPath = Annotated[str | None, typer.Option("--teacher", help="Another teacher than the run's.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the run's.")]
Step = Annotated[int | None, typer.Option(min=0, help="Whose rows; default: the last saved ones.")]

QUANTITIES = {
    "ratio": "overlap ratio",
    "mass_student": "overlap mass, student",
    "mass_teacher": "overlap mass, teacher",
    "advantage": "overlap-token advantage, paper",
    "advantage_verl": "overlap-token advantage, verl",
    "advantage_thunlp": "overlap-token advantage, thunlp",
    "entropy_gap": "entropy gap, nats",
    "student_entropy": "entropy of the student, nats",
    "teacher_entropy": "entropy of the teacher, nats",
    "reverse_kl": "KL(student || teacher), nats",
    "forward_kl": "KL(teacher || student), nats",
    "top1_agreement": "same likeliest token",
    "num_tokens": "tokens",
}


@analyse_app.command()
def overlap(
    sources: Sources,
    student: Student = None,
    teacher: TeacherPath = None,
    step: Step = None,
    rows: Annotated[int, typer.Option(min=1, max=MOST, help="Answers of each source, drawn by the seed.")] = 256,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Length of both lists; default: 16, or an eighth of the vocabulary.")
    ] = None,
    bucket: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a bucket of positions.")] = 1024,
    published: Annotated[
        str | None,
        typer.Option(metavar="STRATEGY:WEIGHT", help="Also what thunlp/OPD logs, e.g. only_stu:student_p."),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="Default: runs/overlap/<names>.")] = None,
) -> None:
    """Do student and teacher look at the same tokens?

    Overlap ratio and mass, overlap-token advantage, entropy gap and divergence of saved answers, by position too. Both
    models read the answers; from a token table of an earlier call the numbers come without a model.
    """
    from opdkit.analysis.overlap import OverlapOptions, analyse_overlap
    from opdkit.analysis.two_models import Reading

    reading = Reading(
        student=student,
        teacher=teacher,
        step=step,
        num_rows=rows,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    options = OverlapOptions(
        sources=tuple(sources), reading=reading, k=k, published=published, bucket_tokens=bucket, out=out
    )
    try:
        results = analyse_overlap(options, console=console)
    except Interrupted:
        raise Interrupted("Nothing was written of the source at hand; run the same command again.") from None
    say(console, _all_tokens(results))
    for name, found in results.items():
        if len(found["by_bucket"]) > 1:
            say(console, _by_bucket(name, found))
        if "published" in found:
            for metric, value in found["published"].items():
                say(console, f"{metric} {value:.6f}")


@analyse_app.command()
def position(
    source: Annotated[Path, typer.Argument(help="A run folder or a file of rows.")],
    student: Student = None,
    teacher: TeacherPath = None,
    step: Step = None,
    rows: Annotated[int, typer.Option(min=1, max=MOST, help="Answers, drawn by the seed.")] = 128,
    branches: Annotated[
        int, typer.Option(min=1, max=MANY, help="Of an answer: at most one in each of so many stretches of it.")
    ] = 4,
    n: Annotated[int, typer.Option("-n", min=1, max=MANY, help="The student's continuations of a branch.")] = 2,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="Default: runs/position/<name>.")] = None,
) -> None:
    """Where along an answer can the teacher be relied on? Resumes.

    Where the teacher prefers another token it is put in, the student goes on and the answer is graded: by relative
    position, beside the two models' disagreement. Run the same command again to go on.
    """
    from opdkit.analysis.branches import PositionOptions, analyse_position
    from opdkit.analysis.two_models import Reading

    reading = Reading(
        student=student,
        teacher=teacher,
        step=step,
        num_rows=rows,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    options = PositionOptions(source=source, reading=reading, per_answer=branches, continuations=n, out=out)
    try:
        found = analyse_position(options, console=console)
    except Interrupted:
        raise Interrupted("The branches so far are kept; run the same command to go on.") from None
    say(console, _by_position(found))
    say(console, _predictors(found))


def _by_position(found: Mapping[str, Any]) -> Table:
    table = Table(
        "position", "KL(student || teacher)", "same likeliest token", "branches", "behind the teacher's token",
        "the answer as it was", "difference", title="By relative position", title_justify="left",
    )  # fmt: skip
    grown = {bin_["start"]: bin_ for bin_ in found["branches"]}
    for tokens in found["by_relative_position"]:
        bin_ = grown.get(tokens["from"])
        told = [_estimate(bin_[name]) for name in ("viability", "own", "difference")] if bin_ else ["-"] * 3
        table.add_row(
            f"{tokens['from']:.1f}-{tokens['to']:.1f}",
            _cell("reverse_kl", tokens["reverse_kl"]),
            _cell("top1_agreement", tokens["top1_agreement"]),
            str(bin_["branches"]) if bin_ else "0",
            *told,
        )
    return table


def _predictors(found: Mapping[str, Any]) -> Table:
    table = Table(
        "predictor", "AUROC", "viable where it is", title="What tells viable branches from others", title_justify="left"
    )
    from opdkit.measure.intervals import FEW

    for name, told in found["predictors"].items():
        side = {True: "large", False: "small", None: "-"}[told["larger_is_viable"]]
        side = "too few to tell" if told["auroc"] is not None and told["problems"] < FEW else side
        table.add_row(name, _estimate({**told, "value": told["auroc"]}), side)
    return table


def _estimate(told: Mapping[str, Any]) -> str:
    if told["value"] is None:
        return "-"
    between = "" if told["low"] is None else f"  [{told['low']:.3f}, {told['high']:.3f}]"
    return f"{told['value']:.3f}{between}"


def _all_tokens(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column a source; right and wrong answers beside all where both are there."""
    columns: dict[str, Mapping[str, Any]] = {}
    for name, found in results.items():
        columns[name] = found["all"]
        if len(found["answers"]) == 2:
            columns |= {f"{name}: {which}": numbers for which, numbers in found["answers"].items()}
    ks = sorted({found["k"] for found in results.values()})
    table = Table(f"lists of {', '.join(map(str, ks))}", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for quantity, label in QUANTITIES.items():
        table.add_row(label, *(_cell(quantity, numbers[quantity]) for numbers in columns.values()))
    return table


def _by_bucket(name: str, found: Mapping[str, Any]) -> Table:
    shown = ("ratio", "mass_student", "mass_teacher", "advantage", "entropy_gap", "reverse_kl", "num_tokens")
    table = Table("tokens", *(QUANTITIES[quantity] for quantity in shown), title=name, title_justify="left")
    for bucket in found["by_bucket"]:
        table.add_row(f"{bucket['from']}-{bucket['to']}", *(_cell(quantity, bucket[quantity]) for quantity in shown))
    return table


def _cell(quantity: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if quantity == "num_tokens" else f"{value:.4f}"
