"""The commands as functions: for notebooks and scripts. What they print, and what they write, is what the commands do.

Bad input is a `UserError` of one sentence. Ctrl-C (a notebook's "interrupt") stops after the step or batch at hand,
with everything saved, and is a KeyboardInterrupt that says how to go on; pressed again, it does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from opdkit.api.rewards import Reward, task_of
from opdkit.api.run import Run
from opdkit.data.readers import IN_PYTHON, problems_of
from opdkit.data.schemas.schema import Schema
from opdkit.errors import Interrupted, UserError
from opdkit.recipe import Recipe, needs_rewards, parse_recipe
from opdkit.recipe.load import merge, read_sections
from opdkit.run.console import Console
from opdkit.types import Problem

if TYPE_CHECKING:
    from opdkit.evaluation.options import EvaluateOptions
    from opdkit.measure.accuracy import Accuracy
    from opdkit.measure.fit import Advice

RecipeLike = Recipe | Mapping[str, Any] | str | Path
OnStep = Callable[[int, Mapping[str, float | None]], object]


def train(
    recipe: RecipeLike,
    *,
    problems: Iterable[Problem | Mapping[str, Any]] | None = None,
    reward: Reward | Sequence[Reward] | Mapping[str, Reward | tuple[float, Reward]] | None = None,
    on_step: OnStep | None = None,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Train the recipe's student, as `opdkit train`; returns the run.

    recipe     a Recipe, its sections as a dict, or a file
    problems   in place of `data.train`: dicts with the columns of a data file, or Problems
    reward     in place of `data.task`: functions of TRL's form (`opdkit.api.rewards`)
    resume     go on from the newest checkpoint; "auto": or begin, where there is no run
    on_step    called after every step with the steps taken and that step's metrics; what it raises ends the run, once
               the steps are saved
    """
    chosen = _recipe(recipe, problems is not None, reward)
    if problems is not None and not isinstance(problems, Iterable):
        raise UserError(f"problems is {type(problems).__name__}; give a list of dicts, or of Problems")
    given = None if problems is None else list(problems)
    data = None
    if given is not None:
        section, task = chosen.data, chosen.data.task
        if not isinstance(section.train, str):
            raise UserError(
                "problems have no place beside a data.train of several sets, whose shares and domains would not be "
                "read; give one of the two"
            )
        schema = Schema(
            task=task.main.name,
            instruction=section.instruction,
            columns=section.columns or None,
            require_gold=needs_rewards(chosen) and task.needs_gold_or_tests,
            asked=task.columns_asked,
            kept=chosen.columns,
        )
        data = problems_of(given, schema, limit=section.limit, seed=chosen.seed)
    from opdkit.reporting import write_report
    from opdkit.run.folder import RunFolder
    from opdkit.training.loop import train as train_recipe

    with _stopping(f"everything is saved in {chosen.run_dir}; go on with the same call and resume=True"):
        train_recipe(
            chosen,
            console=Console(quiet=quiet),
            resume=RunFolder(chosen.run_dir).has_begun if resume == "auto" else resume,
            overwrite=overwrite,
            problems=data,
            on_step=on_step,
        )
    write_report(chosen.run_dir)
    return Run(chosen.run_dir)


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    task: str,
    *,
    n: int = 8,
    out: str | Path | None = None,
    verifier: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Accuracy]:
    """avg@n, pass@k and maj@n of a model by data set, as `opdkit evaluate`. Goes on where an earlier call stopped.

    options: the rest of `EvaluateOptions`, e.g. limit=100, temperature=0.6, max_answer_tokens=4096.
    """
    _refuse_types({"n": n, "data": data}, {"n": int, "data": str | Path | Sequence[str | Path]})
    sources = [str(one) for one in ([data] if isinstance(data, str | Path) else data)]
    asked = _options(options, model=str(model), data=tuple(sources), task=task, num_samples=n)
    from opdkit.evaluation.evaluate import evaluate_model

    with _stopping("the answers so far are kept; the same call goes on"):
        folder = None if out is None else Path(out)
        return evaluate_model(asked, out=folder, console=Console(quiet=quiet), verifier=verifier)


def sample(
    model: str | Path,
    data: str | Path,
    task: str,
    out: str | Path,
    *,
    n: int = 1,
    reject: str = "truncated,no_answer,repetition",
    attempts: int = 3,
    quiet: bool = False,
    **options: Any,
) -> dict[str, int]:
    """A model's answers as training data in `out` (.jsonl), as `opdkit sample`; returns counts. Goes on likewise.

    options: as of `evaluate`.
    """
    _refuse_types({"n": n, "reject": reject, "attempts": attempts}, {"n": int, "reject": str, "attempts": int})
    asked = _options(options, model=str(model), data=(str(data),), task=task, num_samples=n)
    from opdkit.evaluation.sample import SampleOptions, rules_of
    from opdkit.evaluation.sample import sample as sample_answers

    wanted = SampleOptions(model=asked, reject=rules_of(reject), attempts=attempts)
    with _stopping("the answers so far are kept; the same call goes on"):
        return sample_answers(wanted, out=Path(out), console=Console(quiet=quiet))


def fit(recipe: RecipeLike, *, out: str | Path | None = None, quiet: bool = False, **options: Any) -> Advice:
    """Will this teacher help? As `opdkit fit`. options: problems, samples, teacher_answers, k, thresholds."""
    from opdkit.analysis.fit import FitOptions
    from opdkit.analysis.fit import fit as measure_fit

    known = [field.name for field in fields(FitOptions) if field.name != "out"]
    _refuse_unknown(options, known, "opdkit.fit")
    _refuse_types(options, get_type_hints(FitOptions))
    asked = FitOptions(out=None if out is None else Path(out), **options)
    with _stopping("the answers so far are kept; the same call goes on"):
        return measure_fit(_recipe(recipe), asked, console=Console(quiet=quiet))


def report(runs: Run | str | Path | Sequence[Run | str | Path], *, out: str | Path | None = None) -> Path:
    """The page of a run, or one that compares several; returns its path. As `opdkit report`."""
    from opdkit.reporting import write_comparison, write_report

    several: list[Any] = list(runs) if isinstance(runs, list | tuple) else [runs]
    if not several:
        raise UserError("opdkit.report was given no run")
    folders = [run.folder if isinstance(run, Run) else Run(run).folder for run in several]
    path = None if out is None else Path(out)
    return (
        write_report(folders[0], out=path)
        if len(folders) == 1
        else write_comparison(folders, path or Path("comparison.html"))
    )


def _recipe(recipe: RecipeLike, has_problems: bool = False, reward: Any = None) -> Recipe:
    """With what was given beside it in its place."""
    where = "recipe"
    if isinstance(recipe, str | Path):
        where = str(recipe)
        recipe = read_sections(recipe)  # which need not be whole: what it lacks is given beside it
    if isinstance(recipe, Recipe):
        if not has_problems and reward is None:
            return recipe
        recipe = recipe.as_dict()
    if not isinstance(recipe, Mapping):
        raise UserError(f"recipe is {type(recipe).__name__}; give a Recipe, a dict of its sections, or a file")
    given: dict[str, Any] = {} if reward is None else {"task": task_of(reward)}
    section = recipe.get("data", {})
    if has_problems and isinstance(section, Mapping) and "train" not in section:
        given["train"] = IN_PYTHON
    if reward is not None and isinstance(section, Mapping):
        recipe = {**recipe, "data": {key: value for key, value in section.items() if key != "task"}}
    return parse_recipe(merge(recipe, {"data": given}) if given else recipe, where=where)


def _options(options: Mapping[str, Any], **named: Any) -> EvaluateOptions:
    from opdkit.evaluation.options import EvaluateOptions

    known = [field.name for field in fields(EvaluateOptions) if field.name not in named]
    _refuse_unknown(options, known, "opdkit.evaluate and opdkit.sample")
    _refuse_types(options, get_type_hints(EvaluateOptions))
    if named["num_samples"] < 1 or not named["data"]:
        raise UserError("there is nothing to answer: give n of 1 or more, and data")
    return EvaluateOptions(**named, **options)


def _refuse_unknown(options: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    from opdkit.recipe.fields import did_you_mean

    for name in options:
        if name not in known:
            raise UserError(f"{name} is no option of {who}{did_you_mean(name, known)}")


def _refuse_types(options: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Before they fail somewhere inside. A list may stand for a tuple."""
    said = []
    for name, value in options.items():
        try:
            given = tuple(value) if isinstance(value, list) else value
            TypeAdapter(types[name]).validate_python(given, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            said.append(f"{name} = {value!r:.80}: {reason[0].lower()}{reason[1:]}")
    if said:
        raise UserError(*said)


@contextmanager
def _stopping(how_to_go_on: str) -> Iterator[None]:
    """What was stopped is a KeyboardInterrupt: `except Exception` around a notebook's loop must not swallow it."""
    try:
        yield
    except Interrupted as stop:  # a run that paused says why
        raise KeyboardInterrupt(f"{stop}; {how_to_go_on}" if str(stop) else how_to_go_on) from None
