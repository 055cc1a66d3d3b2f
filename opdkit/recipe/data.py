"""[data], [route] and [eval]: what is asked, from which sets, who grades it, and whose teacher reads the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from opdkit.data.schemas.schema import COLUMNS
from opdkit.engines.base import SamplingParams
from opdkit.errors import UserError
from opdkit.recipe.fields import Answers, Count, PositiveInt, Section, Strings, Words, did_you_mean
from opdkit.tasks.options import ChosenTask, TaskOptions, resolve_task
from opdkit.tasks.several import side_by_side
from opdkit.types import Problem


def _roles(columns: Mapping[str, str | tuple[str, ...]]) -> Mapping[str, str | tuple[str, ...]]:
    for role in columns:
        if role not in COLUMNS:
            raise ValueError(f"{role} is no role of a column{did_you_mean(role, COLUMNS)}")
    return columns


AnySet = TypeVar("AnySet", bound=Section)
_WRONG = {"missing": "is missing; add it", "extra_forbidden": "is not a key of a set"}


def _read(tables: Sequence[Any], kind: type[AnySet]) -> tuple[list[AnySet], list[str]]:
    """(the sets, a sentence for each fault)."""
    sets, said = [], []
    for number, table in enumerate(tables):
        try:
            sets.append(kind.model_validate(table))
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join(str(part) for part in (number, *fault["loc"]))
                reason = fault["msg"].removeprefix("Value error, ")
                reason = f"= {fault['input']!r}: {reason[0].lower()}{reason[1:]}"
                said.append(f"{key} {_WRONG.get(fault['type'], reason)}")
    return sets, said


def _sets(value: Any) -> Any:
    """A path stays; a list of tables becomes sets. Raises ValueError with a sentence for each fault of the list."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('give a path, or a list of sets, [{ path = "math.jsonl", share = 0.5, domain = "math" }, ...]')
    sets, said = _read(value, SetSection)
    domains = [found.domain for found in sets]
    if not said and (absent := [str(number) for number, domain in enumerate(domains) if domain is None]):
        said.append(f"{absent[0]}.domain is missing; every set of a list needs a name, domain")
    if not said and (again := [domain for domain in domains if domains.count(domain) > 1]):
        said.append(f'the domain "{again[0]}" is there twice; give each set its own (a route may send two to one view)')
    total = math.fsum(found.share for found in sets)
    if not said and not math.isclose(total, 1, abs_tol=1e-6):
        said.append(f"the shares sum to {total:g}, not to 1; they are parts of every step's problems")
    if said:
        raise ValueError("; ".join(said))
    return tuple(sets)


def _eval_sets(value: Any) -> Any:
    """A path and None stay; a list keeps its paths, and its tables become sets. ValueError as in `_sets`."""
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('give a path, or a list of paths and of sets, ["gsm8k", { path = "mbpp", task = "code" }]')
    sets, said = _read([{"path": one} if isinstance(one, str) else one for one in value], EvalSetSection)
    paths = [one.path for one in sets]
    if not said and (again := [path for path in paths if paths.count(path) > 1]):
        said.append(f"{again[0]} is there twice; name it once")
    if said:
        raise ValueError("; ".join(said))
    return tuple(given if isinstance(given, str) else one for given, one in zip(value, sets, strict=True))


class SetSection(Section):
    """One of the sets of `data.train`."""

    path: Words
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the problems of every step
    # Its name in metrics, and what its problems have for `route.column` where the data has no such column.
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] | None = None
    task: ChosenTask | None = None  # these three: default: those of [data]
    columns: Annotated[Mapping[str, str | Strings], AfterValidator(_roles)] | None = None
    limit: PositiveInt | None = None


class EvalSetSection(Section):
    """One of the sets of `eval.data`, where a path does not say it all."""

    path: Words
    # Of a set of data.train, whose task and columns it takes; under [route], also whose teacher is measured on it.
    domain: Words | None = None
    task: ChosenTask | None = None  # who grades it; default: the domain's, or data.task
    columns: Annotated[Mapping[str, str | Strings], AfterValidator(_roles)] | None = None  # as data.columns


class RouteSection(Section):
    """[route]: each problem asks its own teacher. In place of [teacher] and [context]."""

    column: Words  # of the data: the problem's domain
    views: Annotated[Mapping[str, str], Field(min_length=1)]  # domain -> NAME of the [views.NAME] that reads its rows
    # Whose number a loss is divided by: the whole batch's; or each domain's own, and then the mean over the domains
    # that are in the batch, so that one with long answers counts no more than another.
    denominator: Literal["batch", "domain"] = "batch"

    @property
    def readers(self) -> tuple[str, ...]:
        """The views that it names, each once."""
        return tuple(dict.fromkeys(self.views.values()))

    def domain_of(self, problem: Problem) -> str:
        """Raises UserError for a problem that no view is there for."""
        domain = problem.columns.get(self.column)
        if domain is None:
            raise UserError(
                f'problem {problem.id} has no column "{self.column}", by which [route] finds its teacher; add the '
                "column, name another in route.column, or give each set of data.train a domain"
            )
        if domain not in self.views:
            raise UserError(
                f"problem {problem.id} has {self.column} = {domain[:80]!r}, for which [route.views] names no view "
                f"(domains: {', '.join(self.views)}); add it there, or leave such problems out"
            )
        return domain

    def number_of(self, problem: Problem) -> int:
        """The place of its domain among all."""
        return [*self.views].index(self.domain_of(problem))

    def view_of(self, problem: Problem) -> str:
        return self.views[self.domain_of(problem)]


class DataSection(Section):
    # A path; or several sets, [{ path = "math.jsonl", share = 0.5, domain = "math", task = "math" }, ...].
    train: Annotated[str | tuple[SetSection, ...], BeforeValidator(_sets)]
    # A name, or { name = "tool_use", feedback = "reveal" }: see `opdkit tasks`. "none": nobody grades, rewards are
    # unknown, and prompts alone are enough; for methods that need no reward.
    task: ChosenTask = resolve_task("none")
    # Where data.train keeps things under other names, e.g. { prompt = "q" }; roles are those of `data/schema.py`.
    columns: Annotated[Mapping[str, str | Strings], AfterValidator(_roles)] = {}
    limit: PositiveInt | None = None  # use only so many problems, drawn by the seed; default: all
    # The sentence that is added to prompts which do not say how to write the final answer. "auto": \boxed{} where the
    # task reads one.
    instruction: Literal["auto", "boxed", "answer_line", "none"] = "auto"
    max_prompt_tokens: PositiveInt = 2048  # longer prompts leave the data set, and are counted

    @model_validator(mode="after")
    def _graded_side_by_side(self) -> Self:
        assert self.grader is not None  # making it refuses what cannot be
        return self

    @property
    def sets(self) -> tuple[SetSection, ...]:
        return (SetSection(path=self.train),) if isinstance(self.train, str) else self.train

    def task_of(self, one: SetSection) -> TaskOptions:
        return self.task if one.task is None else one.task

    def set_of(self, domain: str | None) -> SetSection | None:
        """The set of that domain."""
        return next((one for one in self.sets if domain is not None and one.domain == domain), None)

    @property
    def graders(self) -> list[TaskOptions]:
        return [*([] if self.task.is_none else [self.task]), *map(self.task_of, self.sets)]

    @property
    def grader(self) -> TaskOptions:
        """Who grades the answers to all sets."""
        return side_by_side(self.graders)


def _as_sets(named: str | Sequence[str | EvalSetSection] | None) -> tuple[EvalSetSection, ...]:
    sets = () if named is None else (named,) if isinstance(named, str) else named
    return tuple(EvalSetSection(path=one) if isinstance(one, str) else one for one in sets)


class EvalSection(Section):
    # A source as data.train has it, or several, ["gsm8k.jsonl", { path = "mbpp.jsonl", task = "code" }]; a set may name
    # a domain of data.train in place of a task. Default: no evaluation.
    data: Annotated[str | tuple[str | EvalSetSection, ...] | None, BeforeValidator(_eval_sets)] = None
    # Likewise: sets that checkpoints are chosen by (train.keep_best, train.stop_when) and no result is reported of.
    select_on: Annotated[str | tuple[str | EvalSetSection, ...] | None, BeforeValidator(_eval_sets)] = None
    limit: PositiveInt | None = None  # only so many problems, drawn by a seed; default: all
    samples: Answers = 8  # answers to each problem
    every: Count = 0  # steps between evaluations, besides those before and after training; 0: only those
    before: bool = True  # evaluate the student before training
    # Also the exact divergence to the method's target, in both directions, on the student's answers (as it samples in
    # training) to so many problems of each set; 0: not.
    divergence: Count = 0
    # Evaluate the teacher once, as the student is evaluated (without its context); under [route], the teacher of each
    # set's domain.
    teacher: bool = True
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: off
    top_k: Count = 0  # 0: off
    max_answer_tokens: PositiveInt | None = None  # default: sampling.max_answer_tokens, the most of a schedule

    def params(self, longest_answer: int) -> SamplingParams:
        """longest_answer: the recipe's."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_answer_tokens=self.max_answer_tokens or longest_answer,
        )

    @property
    def reported(self) -> tuple[EvalSetSection, ...]:
        return _as_sets(self.data)

    @property
    def sets(self) -> tuple[EvalSetSection, ...]:
        """All that is evaluated."""
        return (*self.reported, *_as_sets(self.select_on))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.path for one in self.sets))
