"""`opdkit plan`: what a run would cost, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdkit.cli.base import MOST, AsJson, Set, app, console
from opdkit.errors import UserError
from opdkit.run.console import Line, Table, say, say_json

if TYPE_CHECKING:
    from opdkit.cost.changes import Change
    from opdkit.cost.plan import Plan

Tokens = Annotated[int | None, typer.Option(min=1, max=MOST)]


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Set = None,
    gpu: Annotated[
        str | None,
        typer.Option(help='A name (rtx4090, a100-80, h100, h200, ...) gives seconds too; or memory alone, "24GB".'),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=4096, help="Of that kind, one process each.")] = 1,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[KEY=]FILE",
            help="A model's config.json, or a name in the table, for the student or a key, e.g. teacher.path=FILE.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Of an average prompt; default: 256.")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Of an average answer; default: the limit, the most it can cost."),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="That a teacher reads besides; default: by the context.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a step costs in memory and time, by formula; loads nothing.

    Memory at the moments of sampling, scoring and update, seconds on a named GPU, whether it fits, and which settings
    would save how much. Estimates, not measurements: docs/inside/performance.md says how they are made and how good
    they were.
    """
    from opdkit.cost.changes import changes, engine_shapes
    from opdkit.cost.devices import device_named
    from opdkit.cost.plan import Sizes, fitting_gpus
    from opdkit.cost.plan import plan as make_plan
    from opdkit.cost.work import Lengths
    from opdkit.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])
    device = None if gpu is None else device_named(gpu)
    sizes = Sizes(_given(config or []))
    lengths = Lengths(prompt=prompt_tokens, answer=answer_tokens, context=context_tokens)
    found = make_plan(resolved, sizes, device=device, lengths=lengths, ranks=gpus)
    fits = fitting_gpus(resolved, sizes, lengths) if gpus == 1 else None
    worth = changes(found, sizes, lengths)
    shapes = {} if resolved.sampling.engine != "vllm" else engine_shapes(found, sizes, lengths)
    if as_json:
        said: dict[str, Any] = {"fits_on": fits, "changes": [change.as_dict() for change in worth]}
        if shapes:
            said["when_idle"] = {how: {"peak": other.peak, "fits": other.fits} for how, other in shapes.items()}
        say_json(console, found.as_dict() | said)
        return
    _say_plan(found)
    for how, other in shapes.items():
        fit = "" if other.fits is None else ", which fits" if other.fits else ", which does not fit"
        say(console, f'sampling.when_idle = "{how}": {_gib(other.peak)} GiB at {other.peak_moment}{fit}')
    if fits is not None:
        say(console, f"Fits one of: {', '.join(fits)}" if fits else "Fits no single GPU of the table.")
    if worth:
        say(console, "", "The next changes worth making, each by itself:", _changes_table(found, worth))


def _given(config: list[str]) -> dict[str, str]:
    """{key of the recipe: what was given for it}."""
    given = {}
    for one in config:
        key, equals, value = one.partition("=")
        if not equals:
            key, value = "model.path", one
        if not key.endswith("path") or not value:
            raise UserError(f"--config {one[:200]}: write --config FILE (the student's), or --config teacher.path=FILE")
        given[key] = value
    return given


def _say_plan(found: Plan) -> None:
    work, device = found.work, found.device
    on = "" if device is None else f" on {work.ranks} x {device.name}" if work.ranks > 1 else f" on {device.name}"
    how = f", layers {'in parts' if work.sharded else 'gathered'}" if work.ranks > 1 else ""
    say(
        console,
        f"{work.recipe.name}{on}{how}: estimate, not measured",
        f"{work.rows} rows a step{' on each' if work.ranks > 1 else ''}, prompts of {work.prompt:,.0f} tokens and "
        f"answers of {work.answer:,.0f} (--prompt-tokens, --answer-tokens); student {_count(work.student.parameters)} "
        f"parameters, {_count(work.trained)} of them trained",
        _memory_table(found),
    )
    if found.in_host_memory:
        parts = ", ".join(f"{_gib(size)} GiB of {what}" for what, size in found.in_host_memory.items())
        say(console, f"In host memory, besides: {parts}")
    for where, size in found.while_loading.items():
        say(console, f"While loading, whole, before ranks cut it: {_gib(size)} GiB {where}")
    peak = f"Peak: {found.peak_moment}, {_gib(found.peak)} GiB"
    if device is None:
        say(console, f"{peak}; --gpu says whether that fits, and how long a step takes")
        return
    verdict = ("fits", "green") if found.fits else ("does not fit", "bold red")
    room = f" {_gib(device.usable)} GiB for tensors ({_gib(device.capacity)} less what CUDA and its allocator take)"
    say(console, Line(f"{peak}: ", verdict, room))
    if found.seconds is None:
        say(console, "Seconds: not known of a capacity alone; name a GPU")
    else:
        parts = ", ".join(f"{moment} {_seconds(value)}" for moment, value in found.seconds.items())
        mfu = "" if found.mfu is None else f"; MFU of the update {found.mfu:.0%}"
        say(console, f"A step: {_seconds(sum(found.seconds.values()))} ({parts}){mfu}; estimate, not measured")


def _memory_table(found: Plan) -> Table:
    from opdkit.cost.memory import PARTS

    table = Table("GiB", *found.moments, is_plain=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        cells = [moment.get(part) for moment in found.moments.values()]
        if any(cells):
            table.add_row(part, *("" if not cell else _gib(cell) for cell in cells))
    table.add_row("together", *(_gib(total) for total in found.totals.values()))
    return table


def _changes_table(before: Plan, worth: list[Change]) -> Table:
    took = None if before.seconds is None else sum(before.seconds.values())
    headers = ["set", "peak GiB", "saves"] + (["step", "takes"] if took is not None else [])
    headers += (["fits"] if before.device is not None else []) + ["learns"]
    table = Table(*headers, is_plain=True)
    table.columns[0].overflow = "fold"
    for change in worth:
        after = change.after
        row = ["\n".join(change.lines), _gib(after.peak), _gib(before.peak - after.peak)]
        if took is not None and after.seconds is not None:
            now = sum(after.seconds.values())
            row += [_seconds(now), f"{now / took - 1:+.0%}"]
        row += [] if before.device is None else ["yes" if after.fits else "no"]
        table.add_row(*row, "otherwise" if change.learns_otherwise else "the same")
    return table


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}" if abs(num_bytes) < 10 * 2**30 else f"{num_bytes / 2**30:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
