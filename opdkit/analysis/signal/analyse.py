"""`opdkit analyse signal`: the steps of an analysis, one after the other or one at a time, each done once.

    rollouts -> contexts -> scores -> metrics -> plots

The first three need the teacher (its tokenizer, its template, its weights; `model_steps.py`). The last two are made
again from scores.jsonl whenever they are asked for, without a model and without torch.
"""

from __future__ import annotations

from pathlib import Path

from opdkit.analysis.signal.answers import ROLLOUTS
from opdkit.analysis.signal.options import SignalOptions
from opdkit.analysis.signal.parts import STEPS
from opdkit.analysis.signal.results import write_metrics, write_plots
from opdkit.errors import UserError
from opdkit.measure.signal import RESAMPLES
from opdkit.run.console import Console, Interrupt, say
from opdkit.run.lock import Lock

MODEL_STEPS = ("rollouts", "contexts", "scores")


def analyse_signal(options: SignalOptions, console: Console) -> None:
    """Run the steps; what is there already is kept. Raises UserError, and Interrupted after Ctrl-C."""
    _check(options)
    interrupt = Interrupt(console)
    with Lock.on_folder(options.folder), interrupt.listening():
        if set(options.steps) & set(MODEL_STEPS):
            from opdkit.analysis.signal.model_steps import ModelSteps  # loads torch

            steps = ModelSteps(options, console, interrupt)
            for step in MODEL_STEPS:
                if step in options.steps:
                    interrupt.check()
                    getattr(steps, step)()
        written: list[Path] = []
        if "metrics" in options.steps:
            written += write_metrics(
                options.folder,
                definitions=options.definitions,
                seed=options.seed,
                resamples=RESAMPLES if options.resamples is None else options.resamples,
            )
        if "plots" in options.steps:
            written += write_plots(options.folder)
    for path in written:
        say(console, f"wrote {path}")


def _check(options: SignalOptions) -> None:
    folder = options.folder
    if (folder / "recipe.toml").exists():
        raise UserError(f"{folder} is a run, not an analysis; give it as --rollouts {folder}, and name another folder")
    for step in options.steps:
        if step not in STEPS:
            raise UserError(f"--steps {step} is no step; choose from {', '.join(STEPS)}")
    if options.rollouts and options.sampling:
        raise UserError("--rollouts takes saved answers and --data samples new ones: choose one")
    if options.resamples is not None and options.definitions != "published":
        raise UserError(
            "--resamples is of the bootstrap of --definitions published, and the intervals of others draw nothing: "
            "leave it out"
        )
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {options.dtype}: choose float32 or bfloat16")
    needs_model = [step for step in MODEL_STEPS if step in options.steps]
    if needs_model and options.model is None:
        raise UserError(f"the step {needs_model[0]} needs the teacher: give --model")
    given = options.rollouts or options.sampling
    if given and options.model is None:
        flag = "--rollouts" if options.rollouts else "--data"
        raise UserError(
            f"{flag} is for the steps {', '.join(MODEL_STEPS)}, which need the teacher: give --model, or leave {flag} "
            "out to have the numbers and figures of what was scored"
        )
    if "rollouts" in options.steps and not given and not (folder / ROLLOUTS).exists():
        raise UserError("no answers were given: --rollouts FILE_OR_RUN takes saved ones, --data and --task sample them")
