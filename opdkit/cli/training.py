"""Commands that train, and those that come before it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from opdkit.cli.base import MANY, MOST, AsJson, Ranks, Seed, Set, app, console, errors, on_ranks
from opdkit.cli.starting import How, Resume, ResumeAuto, WithResumeAuto
from opdkit.errors import Interrupted, UserError
from opdkit.run.console import say, say_json


@app.command()
def quickstart(
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 2, help="Another seed makes other models, problems and samples.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder; an earlier quickstart there is replaced. Default: runs/quickstart, or "
            "runs/quickstart-agent.",
            show_default=False,
        ),
    ] = None,
    agent: Annotated[
        bool, typer.Option("--agent", help="The student learns to call a calculator, in episodes of several turns.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --agent: longer, on more problems, and with an arm that reads peers.")
    ] = False,
) -> None:
    """The whole job from nothing, in minutes on a CPU.

    Makes a teacher and a student, trains the student by on-policy distillation and by its baselines, evaluates and
    reports.
    """
    from opdkit.quickstart import PLAIN, learned, quickstart
    from opdkit.quickstart_agent import AGENT, WHOLE_AGENT

    if whole and not agent:
        raise UserError("--whole is of the longer agent quickstart: give --agent too, or leave it out")
    kind = WHOLE_AGENT if whole else AGENT if agent else PLAIN
    try:
        folder = out or Path("runs/quickstart-agent" if agent else "runs/quickstart")
        summary = quickstart(folder, seed=seed, console=console, kind=kind)
    except Interrupted:
        raise Interrupted("Run it again to start anew.") from None
    if not learned(summary):
        why = "The student did not become measurably better: this is a bug, or an unlucky seed."
        say(errors, why, style="bold red")
        raise typer.Exit(1)


@app.command(cls=WithResumeAuto)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Set = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")] = False,
    ranks: Ranks = 1,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0-4", help="The recipe once with each of these seeds, and their spread."),
    ] = None,
    resume_auto: ResumeAuto = False,
) -> None:
    """Train the recipe's student; writes runs/<name>/."""
    from opdkit.ranks.join import is_rank
    from opdkit.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])  # refused before anything heavy is imported
    if is_rank() and (ranks > 1 or seeds is not None):
        raise UserError("--ranks starts the ranks itself, and --seeds the runs; under torchrun leave them out")
    how = How(("train", str(recipe)), ranks, resume, overwrite, resume_auto)
    if seeds is None:
        how.train(resolved, set_ or [])
        return
    from opdkit.seeds import is_finished, report_seeds, seeds_of, settings_of

    numbers = seeds_of(seeds)
    settings = [[*(set_ or []), *settings_of(resolved, seed)] for seed in numbers]
    recipes = [load_recipe(recipe, own) for own in settings]
    for one in recipes:  # before the first begins
        how.check(one)
    for one, own in zip(recipes, settings, strict=True):
        if (resume or resume_auto) and is_finished(one):
            say(console, f"{one.run_dir} is finished")
            continue
        say(console, f"seed {one.seed}: {one.run_dir}")
        how.train(one, own)
    report_seeds(resolved, numbers, [one.run_dir for one in recipes], console)


@app.command(cls=WithResumeAuto)
def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder whose recipe has a [spool] section.")],
    set_: Set = None,
    name: Annotated[
        str | None, typer.Option(help="Of the new run, beside the old one; default: the old name and -replay.")
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier replay of this name.")] = False,
    ranks: Ranks = 1,
    resume_auto: ResumeAuto = False,
) -> None:
    """Train again on a run's answers and what its teachers said, with another loss.

    Nothing is sampled, and no teacher is loaded: any loss, weight or support on the same answers.
    """
    from opdkit.ranks.join import is_rank
    from opdkit.recipe.replay import replay_recipe

    resolved = replay_recipe(run, set_ or [], name)
    if is_rank() and ranks > 1:
        raise UserError("--ranks starts the ranks itself; under torchrun leave it out")
    command = ("replay", str(run), *(() if name is None else ("--name", name)))
    How(command, ranks, resume, overwrite, resume_auto).train(resolved, set_ or [])


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="A pipeline (TOML with [[stage]]s).")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.KEY=VALUE",
            help="Override a stage's key, e.g. --set opd.train.lr=1e-5; recipe.KEY and paths.NAME are every stage's.",
        ),
    ] = None,
    redo: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Delete what this stage and all after it made; make it again.")
    ] = None,
    ranks: Ranks = 1,
) -> None:
    """Run stages in a row, each from the last one's result; resumes.

    Finished stages are skipped, and one that was stopped goes on: run the same command again.
    """
    from opdkit.recipe.pipeline import load_pipeline

    resolved = load_pipeline(file, set_ or [])  # refused before anything heavy is imported
    from opdkit.pipeline import run_pipeline

    run_pipeline(resolved, console=console, redo=redo, ranks=ranks)


@app.command()
def fit(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML) with a teacher.")],
    set_: Set = None,
    problems: Annotated[int, typer.Option(min=1, max=MOST, help="How many, drawn by the recipe's seed.")] = 64,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=MANY, help="The student's answers to each; default: 4, or group_size if more."),
    ] = None,
    teacher_answers: Annotated[
        int, typer.Option(min=0, max=MANY, help="The teacher's, from the start and from each prefix; 0: none.")
    ] = 2,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Length of both lists; default: 16, or an eighth of the vocabulary.")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Move a limit; fit.json lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/fit/<recipe's name>.")] = None,
    ranks: Ranks = 1,
) -> None:
    """Will this teacher help? Measured before training; resumes.

    The student answers some problems, the teacher reads the answers and goes on from parts of them. Says whether to
    train, to start cold or to choose another teacher, and why. Run the same command again to go on.
    """
    from opdkit.recipe import key_values, load_recipe

    resolved = load_recipe(recipe, set_ or [])
    limits = key_values(threshold or [], flag="--threshold")
    from opdkit.analysis.fit import FitOptions, folder_of
    from opdkit.analysis.fit import fit as measure_fit
    from opdkit.ranks.join import is_launched, join

    minutes = resolved.parallel.timeout_minutes
    if ranks > 1:
        folder = folder_of(resolved, out)
        return on_ranks(ranks, folder, (folder / "asked.json").exists, timeout_minutes=minutes)
    group = join(device=resolved.model.device, timeout_minutes=minutes)
    console.quiet = not group.is_first and not is_launched()
    options = FitOptions(
        problems=problems, samples=samples, teacher_answers=teacher_answers, k=k, out=out, thresholds=limits
    )
    try:
        with group.hearing():
            measure_fit(resolved, options, console=console, ranks=group)
        group.wait()
    except Interrupted:
        raise Interrupted("The answers so far are kept; run the same command to go on.") from None


@app.command()
def check(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes and pipelines (TOML).")],
    set_: Set = None,
    models: Annotated[
        bool,
        typer.Option("--models", help="Also read the models' tokenizers and chat templates, and compare them."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with recipes, and what is doubtful; loads no weights."""
    found = [_checked(path, set_ or [], models) for path in recipes]
    faults = [fault for one in found for fault in one["faults"]]
    if as_json:
        say_json(console, found)
        if faults:
            raise typer.Exit(2)
        return
    for one in found:
        if not one["faults"]:
            say(console, one["path"], mark="ok")
        for sentence in one["warnings"]:
            say(console, sentence, mark="warning")
        for line in one["notes"]:
            say(console, line, mark="note")
    if not models:
        say(console, "no model was read: --models compares tokenizers, chat templates and stop tokens")
    if faults:
        raise UserError(*faults)


def _checked(path: Path, overrides: list[str], models: bool) -> dict[str, Any]:
    """What `check --json` says of a file."""
    from opdkit.cost.at_hand import misfits_in
    from opdkit.cost.plan import Sizes
    from opdkit.recipe.check import check_file, departures_in

    try:
        doubts, notes = check_file(path, overrides), departures_in(path, overrides)
        doubts += misfits_in(path, overrides, Sizes(may_build=models))
        if models:
            from opdkit.training.models.sides import check_models

            doubts += check_models(path, overrides)
    except UserError as error:
        return {"path": str(path), "faults": str(error).splitlines(), "warnings": [], "notes": []}
    return {"path": str(path), "faults": [], "warnings": doubts, "notes": notes}


@app.command("make-model")
def make_model(
    out: Annotated[Path, typer.Argument(help="Folder to write, in Hugging Face format.")],
    data: Annotated[str, typer.Option(help="What it is trained on: arithmetic:..., a file or a hub name.")],
    hidden_size: Annotated[int, typer.Option(min=16, max=MANY)] = 64,
    num_layers: Annotated[int, typer.Option(min=1, max=1000)] = 3,
    vocab_size: Annotated[
        int, typer.Option(min=300, max=2**20, help="For text; arithmetic has its characters.")
    ] = 2048,
    steps: Annotated[
        int, typer.Option(min=0, max=10**6, help="SFT steps on the data's solutions; 0 leaves random weights.")
    ] = 300,
    seed: Seed = 0,
    digits_per_token: Annotated[
        int, typer.Option(min=1, max=3, help="Digits side by side that are one token; Qwen has 1, Llama 3 has 3.")
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Teach only so many problems, again and again: a half-taught model."),
    ] = None,
    reads_demonstrations: Annotated[
        bool,
        typer.Option(
            "--reads-demonstrations",
            help="Also teach it to read worked answers, right and wrong, before the question: for peer methods.",
        ),
    ] = False,
) -> None:
    """Make a tiny test model from nothing.

    Qwen3 architecture, its own tokenizer and chat template, trained a little on the data's solutions.
    """
    from opdkit.training.make_model import make_model

    make_model(
        out, data=data, hidden_size=hidden_size, num_layers=num_layers, vocab_size=vocab_size, steps=steps, seed=seed,
        digits_per_token=digits_per_token, limit=limit, reads_demonstrations=reads_demonstrations, console=console,
    )  # fmt: skip
