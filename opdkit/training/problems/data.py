"""The problems that a run trains on (loaded, routed, drawn step by step), and those it is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from opdkit.contexts.render import LongPrompt, Renderer, long_prompts
from opdkit.contexts.text import text_of
from opdkit.data.readers import Dataset, fingerprint, joined, load_problems
from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.recipe import Recipe, needs_rewards
from opdkit.recipe.data import SetSection
from opdkit.tasks.options import TaskOptions
from opdkit.tasks.several import SeveralOptions
from opdkit.training.problems.order import Draws, problems_of_step
from opdkit.types import Problem


def training_data(recipe: Recipe, problems: Sequence[Problem] | Dataset | None) -> Dataset:
    """The recipe's, or `problems` in their stead. Raises UserError where there are none."""
    if isinstance(problems, Dataset):
        return problems
    if problems is not None:
        return Dataset(
            problems=list(problems),
            fingerprint=fingerprint(problems),
            dropped=[],
            num_duplicate_ids=0,
            source=", ".join(one.path for one in recipe.data.sets),
        )
    return _of_recipe(recipe)


def evaluation_sets(recipe: Recipe) -> dict[str, Dataset]:
    """By source."""
    found, several = {}, isinstance(recipe.grader, SeveralOptions)
    for one in recipe.eval.sets:
        task, like = recipe.eval_tasks[one.path], recipe.data.set_of(one.domain)
        columns = like.columns if one.columns is None and like else one.columns
        data = load_problems(
            one.path,
            task=task.main.name,
            limit=recipe.eval.limit,
            instruction=recipe.data.instruction,
            columns=columns,
            require_gold=task.needs_gold_or_tests,
            asked=(*task.main.columns_asked, *_episode_columns(recipe)),
        )
        data = _in_domain(recipe, data, one.domain)
        found[one.path] = graded_by(task, data) if several or not isinstance(recipe.data.train, str) else data
    return found


def _of_recipe(recipe: Recipe) -> Dataset:
    """What `data.train` names; of a list of sets with `parts`, by domain.

    Raises UserError for a set that cannot be read or has no usable problem.
    """
    if isinstance(recipe.data.train, str):
        data = _load(recipe, recipe.data.sets[0])
        return graded_by(recipe.data.task, data) if isinstance(recipe.grader, SeveralOptions) else data
    return joined({one.domain: _load(recipe, one) for one in recipe.data.train if one.domain})


def _load(recipe: Recipe, one: SetSection) -> Dataset:
    section, task = recipe.data, recipe.data.task_of(one)
    data = load_problems(
        one.path,
        task=task.main.name,
        limit=one.limit or section.limit,
        seed=recipe.seed,
        instruction=section.instruction,
        columns=(section.columns if one.columns is None else one.columns) or None,
        require_gold=needs_rewards(recipe) and task.needs_gold_or_tests,
        asked=(*task.columns_asked, *_episode_columns(recipe)),
        kept=recipe.columns,
    )
    if one.domain is None:
        return data
    return graded_by(task, _in_domain(recipe, data, one.domain))


def _episode_columns(recipe: Recipe) -> tuple[str, ...]:
    """Of the data, that the environment reads."""
    return () if recipe.episode is None else recipe.episode.environment.columns_asked


def _in_domain(recipe: Recipe, data: Dataset, domain: str | None) -> Dataset:
    """The set whose problems have the domain in the column of [route], where the data itself has no such column."""
    if recipe.route is None or domain is None:
        return data
    named = {recipe.route.column: domain}
    problems = [replace(problem, columns={**named, **problem.columns}) for problem in data.problems]
    return replace(data, problems=problems)


def graded_by(task: TaskOptions, data: Dataset) -> Dataset:
    """The set under the name of the task that grades it (generated problems have one of their own)."""
    problems = [replace(problem, task=task.main.name) for problem in data.problems]
    return replace(data, problems=problems, fingerprint=fingerprint(problems))


def check_readable(recipe: Recipe, data: Dataset) -> None:
    """Raises UserError for a problem that [route] has no view for, and for a context with nothing to show of any."""
    for path in recipe.context_files.values():
        text_of(path)
    for problem in data.problems if recipe.route else ():
        assert recipe.route is not None
        recipe.route.view_of(problem)
    for name, view in recipe.all_views.items():
        where = "context" if name == "teacher" else f"views.{name}.context"
        routed = recipe.route is not None and name in recipe.route.readers
        read = [p for p in data.problems if not routed or (recipe.route and recipe.route.view_of(p) == name)]
        if not read:
            continue
        if view.context.needs_solutions and not any(problem.solution for problem in read):
            raise UserError(
                f'{where}.kind = "{view.context.kind}" shows the teacher reference solutions, but no problem of '
                f"{data.source} has one; use data with a solution column, or another context"
            )
        for column in view.context.needs_columns:
            if not any(column in problem.columns for problem in read):
                raise UserError(
                    f'{where}.column = "{column}" is filled in for no problem of {data.source}; name a column that '
                    "the data has, or another context"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """The problems whose prompt leaves room for an answer, the longest that does, and the prompts that do not."""

    problems: list[Problem]
    limit: int  # tokens
    long: list[LongPrompt]


def fitting(recipe: Recipe, data: Dataset, renderer: Renderer, room: int | None) -> Fitting:
    """room: the student's positions. Raises UserError where there is no such problem."""
    limit = recipe.data.max_prompt_tokens
    if room is not None:
        limit = min(limit, room - recipe.longest_turn)
    if limit < 1:
        raise UserError(
            f"sampling.max_answer_tokens = {recipe.longest_turn} leaves no room for a prompt: "
            f"{recipe.model.path} has {room} positions; lower it"
        )
    long = long_prompts(((p.id, renderer.prompt_ids_within(p.messages, limit)) for p in data.problems), limit)
    if len(long) == len(data.problems):
        raise UserError(
            f"data.train = {data.source}: every prompt is longer than {limit} tokens (the first: "
            f"{long[0].num_tokens}); raise data.max_prompt_tokens, lower sampling.max_answer_tokens, or use a model "
            "with more positions"
        )
    left_out = {prompt.problem_id for prompt in long}
    return Fitting(problems=[p for p in data.problems if p.id not in left_out], limit=limit, long=long)


def check_evaluations(recipe: Recipe, sets: Mapping[str, Dataset], renderer: Renderer, room: int | None) -> None:
    """room: the student's positions. Raises UserError for an evaluation that would only fail after training."""
    longest = recipe.eval.max_answer_tokens or recipe.longest_turn
    if room is None:
        return
    for source, data in sets.items():
        most = room - longest
        long = long_prompts(((p.id, renderer.prompt_ids_within(p.messages, most)) for p in data.problems), most)
        if long:
            raise UserError(
                f"eval.data = {source}: {len(long)} prompts leave no room for {longest} answer tokens in the "
                f"model's {room} positions (first: {long[0].problem_id}, {long[0].num_tokens} tokens); lower "
                "eval.max_answer_tokens, or evaluate on other data"
            )


def row_doubts(recipe: Recipe, data: Dataset) -> Iterator[str]:
    """What is not used of a set as it is, a sentence each."""
    yield from data.files_left_out
    if data.dropped:
        where, why = data.dropped[0]
        yield f"{len(data.dropped)} rows of {data.source} cannot be used (first: {where}: {why})"
    own = sum(any(turn["role"] == "system" for turn in problem.messages) for problem in data.problems)
    if recipe.model.system and own:
        yield f"{own} problems of {data.source} have a system turn, which model.system takes the place of"
    if data.num_duplicate_ids:
        yield f"{data.num_duplicate_ids} rows of {data.source} repeat an id; they are kept under ids of their own"


def by_task(problems: Sequence[Problem]) -> list[list[Problem]]:
    """The problems of each task."""
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.task, []).append(problem)
    return list(found.values())


class TrainProblems:
    """What the steps take, step by step."""

    def __init__(self, recipe: Recipe, data: Dataset, problems: Sequence[Problem]) -> None:
        """problems: those of `data` that are not left out. Raises UserError where they are fewer than a step wants."""
        self._problems, self._per_step, self._seed = problems, recipe.train.problems_per_step, recipe.seed
        self._draws: Draws[Problem] | None = None
        if data.parts:
            kept = {problem.id for problem in problems}
            sets = {name: [p for p in part.problems if p.id in kept] for name, part in data.parts.items()}
            shares = {one.domain: one.share for one in recipe.data.sets if one.domain}
            steps = recipe.train.steps
            self._draws = Draws(sets, shares, per_step=self._per_step, num_steps=steps, seed=self._seed)
        self.of_step(0)

    def of_step(self, step: int) -> list[Problem]:
        if self._draws is not None:
            return self._draws.of_step(step)
        return problems_of_step(self._problems, step=step, per_step=self._per_step, seed=self._seed)

    def metrics(self, step: int) -> list[Metric]:
        """Of the step after `step` others; none where there is one set."""
        return [] if self._draws is None else self._draws.metrics(step)
