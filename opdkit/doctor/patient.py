"""What the checks look at: the parts that `opdkit train` would make, a few answers, what the views say of them.

Each is made when a check first asks for it, once, by the code that trains. Nothing is written but in a folder of its
own beside the runs, which is removed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor

from opdkit.cost.plan import Sizes
from opdkit.data.readers import Dataset
from opdkit.doctor.findings import Unavailable
from opdkit.doctor.learning import Gradients, gradients_of
from opdkit.doctor.trainer import TrainerSays, says, shortened, states_of
from opdkit.engines.base import Sampled, Sampler, SamplingParams
from opdkit.engines.load import check_model_path, pick_device
from opdkit.engines.model import LanguageModel
from opdkit.losses import Head
from opdkit.measure.overlap import TokenTable, default_k
from opdkit.ranks.base import ALONE
from opdkit.recipe import Recipe, check_installed
from opdkit.run.console import Console, Interrupt
from opdkit.training.beside import engine_beside
from opdkit.training.deal import deal_rows
from opdkit.training.loop import TrainingRun
from opdkit.training.metrics.agreement import Side, compare_rows, heard_tokens, hidden_states
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.sides import Sides, compare_sides
from opdkit.training.parts import Parts
from opdkit.training.problems.data import check_readable, evaluation_sets, training_data
from opdkit.training.state import State
from opdkit.training.views import join, score, view_groups
from opdkit.types import Asked, Example, Group, Problem, Signal, seed_from

T = TypeVar("T")
MOST_SIBLINGS = 4  # answers to a problem: enough for a context of peers
PROBE_TEMPERATURE = 1.5  # not 1: an engine that does not hear it shows, the more so the flatter its distribution is
DISTRIBUTION = Asked("distribution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dose:
    """How much is looked at."""

    answers: int = 8
    answer_tokens: int = 32  # each is cut there
    probe_tokens: int = 16  # of the answers that only prove the engine
    learned_rows: int = 3  # that gradients are made of
    learned_tokens: int = 12  # of each of their answers


QUICK = Dose(answers=4, answer_tokens=12, probe_tokens=8, learned_rows=2, learned_tokens=6)


class Made(Generic[T]):
    """Made at the first call and kept. Where making it raises, the one who asked first hears why, all others that
    `what` is not there."""

    def __init__(self, what: str, make: Callable[[Any], T]) -> None:
        self._what, self._make = what, make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, patient: None, owner: type) -> Self: ...
    @overload
    def __get__(self, patient: Patient, owner: type) -> T: ...
    def __get__(self, patient: Patient | None, owner: type) -> Self | T:
        if patient is None:
            return self
        if self._name in patient.lacking:
            raise Unavailable(patient.lacking[self._name])
        if self._name not in patient.made:
            try:
                patient.made[self._name] = self._make(patient)
            except Exception:
                patient.lacking[self._name] = self._what
                raise
        found: T = patient.made[self._name]
        return found


def once(what: str) -> Callable[[Callable[[Any], T]], Made[T]]:
    """what: for sentences."""
    return lambda make: Made(what, make)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """Answers that an engine gave to some prompts, asked for with one set of parameters."""

    prompts: list[tuple[int, ...]]
    sampled: list[Sampled]
    params: SamplingParams

    @property
    def answers(self) -> list[tuple[int, ...]]:
        return [one.answer_ids for one in self.sampled]


class Patient:
    """A recipe, and what is made of it. A context manager: what was opened is closed."""

    def __init__(self, recipe: Recipe, dose: Dose, console: Console) -> None:
        self.given, self.dose, self.console = recipe, dose, console
        self.made: dict[str, Any] = {}
        self.lacking: dict[str, str] = {}
        self.seconds: dict[str, float] = {}  # that sampling, scoring and learning took
        self._read: dict[int, list[Tensor]] = {}  # the student's states behind answers of the engine
        self._alone: dict[int, Tensor] = {}  # a model's states behind the few rows, each by itself
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @cached_property
    def folder(self) -> Path:
        """For what must be written."""
        runs = Path(self.given.runs_dir).expanduser()
        is_new = not runs.exists()
        runs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs))
        if is_new:
            self._opened.callback(lambda: shutil.rmtree(runs, ignore_errors=True))
        self._opened.callback(lambda: shutil.rmtree(folder, ignore_errors=True))
        return folder

    @once("the recipe's parts")
    def recipe(self) -> Recipe:
        check_installed(self.given)
        for path in self.given.model_paths.values():
            check_model_path(path)
        return self.given.on_device(pick_device(self.given.model.device).type)

    @once("both tokenizers")
    def sides(self) -> Sides:
        return compare_sides(self.recipe)

    @once("the data")
    def data(self) -> Dataset:
        data = training_data(self.recipe, None)
        check_readable(self.recipe, data)
        return data

    @once("the models")
    def run(self) -> TrainingRun:
        """As `train` makes it, up to its first step."""
        recipe, data = self.recipe, self.data
        if self.sides.faults:
            raise Unavailable("models that fit each other")
        parts = Parts(recipe, None)
        quiet = Console(quiet=True)
        try:
            run = TrainingRun(recipe, parts, data, evaluation_sets(recipe), quiet, ranks=ALONE)
        except BaseException:
            parts.close()
            raise
        self._opened.enter_context(closing(run))
        return run

    @property
    def state(self) -> State:
        return self.run.state

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """By view."""
        return {name: viewer.teacher for name, viewer in self.run.parts.viewers.items()}

    @once("the problems")
    def problems(self) -> list[Problem]:
        """Of the first step, and of every domain at least one."""
        run, recipe = self.run, self.recipe
        drawn = run.drawn.of_step(0)
        if recipe.saved_run:
            return drawn  # whose answers are kept together
        size = self._group_size
        chosen = drawn[: max(1, self.dose.answers // size)]
        if recipe.route is not None:
            there = {recipe.route.domain_of(problem) for problem in chosen}
            for problem in [*drawn, *run.problems]:
                if recipe.route.domain_of(problem) not in there:
                    there.add(recipe.route.domain_of(problem))
                    chosen.append(problem)
        return chosen

    @property
    def _group_size(self) -> int:
        return min(self.recipe.sampling.group_size, MOST_SIBLINGS)

    @property
    def is_cut(self) -> bool:
        """Whether answers are shorter here than in the run."""
        return self.dose.answer_tokens < self.recipe.sampling.max_answer_tokens and not self.recipe.saved_run

    @once("the engine that samples")
    def engine(self) -> Sampler:
        """The student's, as the recipe has it; one in another process is started, given the weights and proved."""
        run = self.run
        interrupt = Interrupt(self.console)
        asked = (self.recipe, run.parts, self.folder, self.console, interrupt, run.warn)
        if self.recipe.sampling.engine != "hf":
            run.answers.server = self._opened.enter_context(engine_beside(*asked))
        return run.answers.student_engine(0)

    @once("the answers")
    def groups(self) -> list[Group]:
        """Graded answers to the problems, fewer and shorter than the run's."""
        assert self.engine is not None
        recipe, run = self.recipe, self.run
        most = min(self.dose.answer_tokens, recipe.sampling.max_answer_tokens)
        less = {"max_answer_tokens": most, "group_size": self._group_size}
        short = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=less)})
        for teacher in run.state.teachers:
            teacher.before_step(0)
        started = time.monotonic()
        groups = replace(run.answers, recipe=short, ahead=None)(self.problems, 0)
        self.seconds["sample"] = time.monotonic() - started
        return groups[: self.dose.answers] if recipe.saved_run else groups

    @once("what the views read and say")
    def heard(self) -> tuple[list[Example], dict[tuple[str, int], tuple[Teacher, Signal]]]:
        """(the rows with what every view read and said; by rollout, who read the view "teacher", and what he says of
        whole distributions where he can)."""
        state, groups = self.state, self.groups
        started = time.monotonic()
        views = view_groups(state, groups)
        deal = deal_rows(state, [groups], views)
        said: dict[tuple[str, int], tuple[Teacher, Signal]] = {}
        keys = {rollout.key for group in groups for rollout in group.rollouts if self._says_all(group.problem)}
        signals = score(
            state,
            groups,
            views,
            deal,
            keys,
            lambda teacher, rollout, signal: said.update({rollout.key: (teacher, signal)}),
        )
        self.seconds["score"] = time.monotonic() - started
        return join(groups, views, signals), said

    def _says_all(self, problem: Problem) -> bool:
        state = self.state
        return "teacher" in state.needs.views and state.viewers[state.reader("teacher", problem)].teacher.can_say(
            DISTRIBUTION
        )

    @property
    def rows(self) -> list[Example]:
        return self.heard[0]

    @once("the student's hidden states")
    def states(self) -> list[Tensor]:
        """[T, H] the student's behind each row's answer, on its prompt."""
        return states_of(self.state, self.weights, [row.rollout.prompt_ids for row in self.rows], self.answer_ids)

    @property
    def answer_ids(self) -> list[tuple[int, ...]]:
        return [row.rollout.answer_ids for row in self.rows]

    @property
    def weights(self) -> Mapping[str, Tensor] | None:
        with torch.no_grad():
            return self.state.optimizer.compute_weights()

    @property
    def head(self) -> Head:
        return self.state.student.head(self.weights)

    @property
    def few_rows(self) -> list[Example]:
        """The first ones, siblings and another, shortened, without what the views said."""
        rows, num = self.rows, self.dose.learned_rows
        chosen = [*rows[: max(1, num - 1)], *rows[-1:]] if len(rows) >= num > 1 else rows[:num]
        return [shortened(row, self.dose.learned_tokens) for row in chosen]

    @once("the gradients")
    def gradients(self) -> Gradients:
        started = time.monotonic()
        found = gradients_of(self.state, self.few_rows)
        self.seconds["learn"] = time.monotonic() - started
        return found

    @once("the models' sizes")
    def sizes(self) -> Sizes:
        """Of the models, by their configs; what is built is kept."""
        return Sizes()

    @once("both sides' distributions")
    def table(self) -> TokenTable | None:
        """Both sides of every token that the view "teacher" says something of, `row_N` counting `rows`; None: no
        teacher that gives whole distributions has read any."""
        rows, said = self.heard
        states = dict(zip((row.rollout.key for row in rows), self.states, strict=True))
        place = {row.rollout.key: number for number, row in enumerate(rows)}
        tables = []
        for reader in dict.fromkeys(teacher for teacher, _ in said.values()):
            own = [row for row in rows if row.rollout.key in said and said[row.rollout.key][0] is reader]
            signals = [said[row.rollout.key][1] for row in own]
            counted = heard_tokens(own, [signal.spans for signal in signals])
            if not any(row.rollout.answer_mask.any() for row in counted):
                continue
            found = compare_rows(
                counted,
                _side(states, self.head),
                _side({row.rollout.key: one for row, one in zip(own, hidden_states(signals), strict=True)},
                      signals[0].head),
                k=default_k(self.state.student.num_tokens),
                temperature=self.state.method.loss_temperature,
                device=self.state.student.device,
            )  # fmt: skip
            numbers = torch.tensor([place[row.rollout.key] for row in own]).numpy()
            tables.append(replace(found, row_N=numbers[found.row_N]))
        return TokenTable.joined(tables) if tables else None

    def alone(
        self,
        model: LanguageModel,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        weights: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """[N, H] of rows that go through a model one by one, neither packed nor padded."""
        if id(model) not in self._alone:
            packs, model.packs = model.packs, False
            try:
                pairs = zip(contexts, answers, strict=True)
                found = [model.hidden([context], [answer], weights=weights) for context, answer in pairs]
            finally:
                model.packs = packs
            self._alone[id(model)] = torch.cat(found)
        return self._alone[id(model)]

    def says_of(self, spoken: Spoken, temperature: float) -> TrainerSays:
        """The trainer, of answers that the engine gave."""
        if id(spoken) not in self._read:
            self._read[id(spoken)] = states_of(self.state, self.weights, spoken.prompts, spoken.answers)
        return says(self._read[id(spoken)], self.head, spoken.answers, temperature=temperature)

    def speak(self, temperature: float, num: int) -> Spoken:
        """`num` answers of the engine to the problems' prompts, all of whose tokens may be drawn."""
        prompts = [self.run.parts.renderer.prompt_ids(problem.messages) for problem in self.problems]
        prompts = [prompts[number % len(prompts)] for number in range(num)]
        seeds = [seed_from(self.recipe.seed, "doctor", str(temperature), number) for number in range(num)]
        params = SamplingParams(temperature=temperature, max_answer_tokens=self.dose.probe_tokens)
        return Spoken(prompts=prompts, sampled=self.engine.sample(prompts, seeds, params), params=params)

    @once("greedy answers")
    def greedy(self) -> Spoken:
        return self.speak(0.0, min(4, self.dose.answers))

    @once("drawn answers")
    def drawn(self) -> Spoken:
        return self.speak(PROBE_TEMPERATURE, self.dose.answers)


def _side(states: Mapping[tuple[str, int], Tensor], head: Head) -> Side:
    return Side(hidden=lambda rows: [states[row.rollout.key] for row in rows], head=head)
