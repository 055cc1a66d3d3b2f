"""Commands that measure what was saved: `opdkit analyse ...`. None of them needs a model unless it says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from opdkit.cli.base import MANY, Sampling, app, console, with_sampling
from opdkit.errors import Interrupted, UserError
from opdkit.run.console import say

if TYPE_CHECKING:
    from opdkit.analysis.signal.sampling import SamplingOptions

analyse_app = typer.Typer(
    help="Measure saved answers and saved teacher signals.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)
app.add_typer(analyse_app, name="analyse")


@analyse_app.callback()
def analyse() -> None:
    """Measure saved answers and saved teacher signals."""


@analyse_app.command()
@with_sampling
def signal(
    asked: Sampling,
    folder: Annotated[Path, typer.Argument(help="Where the analysis is written, and read.")],
    model: Annotated[
        str | None, typer.Option(help="The teacher: a folder or a hub id. None: metrics and plots.")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="A run, its rows/, answers of evaluate or sample, or another analysis.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Instead: sample answers to this data set.")] = None,
    task: Annotated[str | None, typer.Option(help="Who grades them: see `opdkit tasks`.")] = None,
    student: Annotated[str | None, typer.Option(help="Who answers; default: the teacher itself.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, max=MANY, help="Answers per problem.")] = 8,
    steps: Annotated[str | None, typer.Option(help="In commas: rollouts,contexts,scores,metrics,plots.")] = None,
    conditions: Annotated[str, typer.Option(help="In commas, e.g. base,2S1F; or all.")] = "all",
    design: Annotated[Literal["fixed", "siblings"], typer.Option(help="What is shown beside an answer.")] = "fixed",
    definitions: Annotated[
        Literal["careful", "published"], typer.Option(help="Undefined metrics leave the mean, or are 0.")
    ] = "careful",
    context: Annotated[
        list[str] | None,
        typer.Option("--context", metavar="KEY=VALUE", help="How peers are shown, e.g. max_tokens_per_peer=2048."),
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Of the bootstrap of published definitions; 2000.")
    ] = None,
) -> None:
    """Does the teacher rank answers as the grader does, and with which context? Resumes.

    Takes saved answers (--rollouts) or samples some (--data), has the teacher score each of them behind every context,
    and measures the ranking. Run the same command again to go on. Without --model: the numbers and figures anew.
    """
    from opdkit.analysis.signal.analyse import analyse_signal
    from opdkit.analysis.signal.options import SignalOptions
    from opdkit.analysis.signal.parts import STEPS
    from opdkit.recipe import key_values

    options = SignalOptions(
        folder=folder,
        steps=tuple(steps.replace(" ", "").split(",")) if steps else STEPS if model else STEPS[3:],
        model=model,
        rollouts=rollouts,
        sampling=_to_sample(asked, data, task, student, n),
        limit=asked.limit,
        conditions=conditions,
        design=design,
        context=key_values(context or [], flag="--context"),
        chat_template=asked.chat_template,
        template_kwargs=key_values(asked.template or [], flag="--template"),
        close_thinking=asked.close_thinking,
        system=asked.system,
        stop_tokens=tuple(asked.stop_token) if asked.stop_token else None,
        dtype=asked.dtype,
        device=asked.device,
        trust_remote_code=asked.trust_remote_code,
        max_tokens_per_batch=asked.max_tokens_per_batch,
        engine=asked.engine,
        url=asked.url,
        seed=asked.seed,
        definitions=definitions,
        resamples=resamples,
    )
    try:
        analyse_signal(options, console)
    except Interrupted:
        raise Interrupted("What was scored is kept; run the same command to go on.") from None


def _to_sample(
    asked: Sampling, data: str | None, task: str | None, student: str | None, n: int
) -> SamplingOptions | None:
    """None: answers that were saved are scored."""
    from opdkit.evaluation.options import check_engine

    check_engine(asked.engine, asked.url)
    if data is None and asked.engine != "hf":
        raise UserError(f"--engine {asked.engine} samples answers to --data: give --data and --task, or leave it out")
    if (data is None) != (task is None):
        raise UserError("--data and --task go together: what is answered, and who grades it")
    if data is None or task is None:
        if student is not None:
            raise UserError("--student answers --data: give --data and --task, or leave it out")
        return None
    from opdkit.analysis.signal.sampling import SamplingOptions
    from opdkit.engines.base import SamplingParams

    params = SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_answer_tokens=asked.max_answer_tokens,
    )
    return SamplingOptions(
        data=data, task=task, num_samples=n, student=student, params=params, instruction=asked.instruction
    )


@analyse_app.command()
def diversity(
    runs: Annotated[
        list[str],
        typer.Argument(help="Evaluations or runs (RUN@before, @teacher, @STEP, @rows); NAME=PATH to name one."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the page and the tables; default: print only.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=2, help="Only the first so many answers of a problem.")] = None,
    text_distance: Annotated[
        bool,
        typer.Option("--text-distance", help="Also the published distance of characters; minutes for long answers."),
    ] = False,
) -> None:
    """How different a model's answers to one problem are.

    Self-BLEU, distinct n-grams, distances of texts and of programs' syntax trees, all answers and right ones, beside
    pass@k. Needs no model.
    """
    from opdkit.analysis.diversity import DiversityOptions, measure_runs, write_diversity
    from opdkit.cli.tables import diversity_tables
    from opdkit.run.console import Bars

    options = DiversityOptions(text_distance=text_distance, max_answers=n)
    with Bars(console) as bars:
        results = measure_runs(runs, options=options, progress=bars.update)
    for part in diversity_tables(results):
        say(console, part)
    if out is not None:
        for path in write_diversity(out, results):
            say(console, f"wrote {path}")
