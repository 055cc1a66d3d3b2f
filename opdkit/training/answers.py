"""Where a step's answers come from: the student (on-policy), the data set, or the teacher (cold starts)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from opdkit.contexts import build_views
from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress, Sampler, SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.sampling.slots import Counts
from opdkit.metrics import Metric
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe
from opdkit.rollouts.single_turn import Answer, dataset_groups, groups_of, read_by, sample_share, written_by
from opdkit.rollouts.stage import Counts as EpisodeCounts
from opdkit.rollouts.stage import Stage
from opdkit.tasks.base import Task
from opdkit.training.ahead import Ahead
from opdkit.training.episode_proof import prove_episodes
from opdkit.training.metrics.episodes import describe_counts
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.student_server import StudentServer
from opdkit.training.saved.saved_run import SavedRun
from opdkit.training.state import Viewer
from opdkit.types import Group, Problem, Rollout


@dataclass(slots=True)
class Answers:
    """Called with (problems, step) it returns graded groups. The prompts are always the student's."""

    recipe: Recipe
    student: LanguageModel
    renderer: Renderer
    optimizer: Optimizer
    viewers: Mapping[str, Viewer]
    task: Task
    run: SavedRun | None = None  # whose answers are read again
    ranks: Ranks = ALONE
    progress: Progress | None = None  # hears of answers as they are finished
    server: StudentServer | None = None  # who samples for the student; None: this process
    ahead: Ahead | None = None  # who asks for answers before their step (sampling.lag)
    stage: Stage | None = None  # where the student plays episodes; None: answers have one turn
    _counts: Counts = field(default_factory=Counts)  # of the step
    _played: list[EpisodeCounts] = field(default_factory=list)  # of its episodes

    def __call__(self, problems: Sequence[Problem], step: int) -> list[Group]:
        if self.run is not None:
            return self.run.groups(problems, step)
        source = self.recipe.method.answer_source
        if source == "student" and self.ahead is not None:
            return self.ahead.take(step)
        if source == "student":
            sampled = groups_of(problems, self.ranks.from_all(self.begin(self.recipe, problems, step, step)))
            if self.server is not None:
                self.server.rest()
            return sampled
        if source == "dataset":
            return dataset_groups(
                problems,
                renderer=self.renderer,
                stop_id=self.student.end_id,
                max_answer_tokens=self.recipe.sampling.max_answer_tokens,
                policy_version=step,
            )
        route = self.recipe.route
        asked: dict[str, list[Problem]] = {}
        for problem in problems:
            asked.setdefault(route.view_of(problem) if route else "teacher", []).append(problem)
        groups = {
            group.problem.id: group
            for view, own in asked.items()
            for group in self._of_teacher(self.viewers[view], own, step)
        }
        return [groups[problem.id] for problem in problems]

    def begin(
        self, recipe: Recipe, problems: Sequence[Problem], step: int, version: int
    ) -> Callable[[], Sequence[Answer]]:
        """What writes this rank's share of the student's answers that `step` learns from, with the weights of this
        moment, which are of `version`. recipe: as it is at that step."""
        engine = self.student_engine(version)
        return lambda: self._sampled(engine, self.renderer, problems, step, recipe=recipe, version=version)

    def prove_episodes(self, problems: Sequence[Problem], step: int) -> list[str]:
        """What is doubtful of how episodes are scored (`prove_episodes`); nothing where answers have one turn."""
        if self.stage is None or self.run is not None:
            return []
        said = prove_episodes(
            self.stage,
            sampler=self.student_engine(step),
            scorer=HFEngine(self.student, weights=self._weights()),
            renderer=self.renderer,
            task=self.task,
            params=self._params(self.recipe),
            problems=problems,
            seed=self.recipe.seed,
            exact=self.recipe.model.dtype == "float32",
        )
        if self.server is not None:
            self.server.rest()
        return said

    def drain(self) -> list[Metric]:
        """How full the batches were in which the answers since the last call were sampled, and what rows do not say of
        episodes; nothing where none was.

        occupancy: the share of rows times columns, over all tokens decoded, that holds a token of a row that goes on.
        """
        counts, self._counts = self._counts, Counts()
        played: list[Metric] = []
        if self.stage is not None:  # the first rank says it of all
            turns, self._played = EpisodeCounts.sum(self._played), []
            played = describe_counts(EpisodeCounts.sum(self.ranks.gather_on_first(turns)))
        if not counts.steps:
            return played
        return [
            *played,
            Metric("rollout/occupancy", counts.positions / counts.room),
            Metric("rollout/rows_together", counts.row_steps / counts.steps),
            Metric("rollout/evictions", float(counts.evictions), "sum"),
        ]

    def student_engine(self, version: int) -> Sampler:
        """The student with the weights of this moment, which are of `version`, as the computation reads them."""
        if self.server is not None:
            return self.server.engine(version)
        most = self.recipe.sampling.max_tokens_per_batch
        return HFEngine(self.student, max_tokens_per_batch=most, weights=self._weights())

    def _weights(self) -> dict[str, torch.Tensor] | None:
        with torch.no_grad():
            return self.optimizer.compute_weights()

    def _params(self, recipe: Recipe) -> SamplingParams:
        """Of what is sampled at once."""
        params = recipe.sampling.params
        if recipe.episode is None:
            return params
        return replace(params, max_answer_tokens=recipe.episode.turn_tokens(params.max_answer_tokens))

    def held_out(self, problems: Sequence[Problem], version: int) -> list[Group]:
        """The student's answers to problems that it does not learn from, sampled as in training; the same draws however
        often it is asked, so that what changes is the student."""
        sampling = self.recipe.sampling
        params = sampling.params
        if self.recipe.episode is not None:
            params = replace(params, max_answer_tokens=self.recipe.episode.turn_tokens(params.max_answer_tokens))
        engine = self.student_engine(version)
        write = partial(
            sample_share,
            problems,
            sampler=engine,
            renderer=self.renderer,
            task=self.task,
            params=params,
            group_size=sampling.group_size,
            identity=(self.recipe.seed, "held out"),
            policy_version=version,
            ranks=self.ranks,
            stage=self.stage,
        )
        return groups_of(problems, self.ranks.from_all(write))

    def can_read(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether `engine_of` can: not where they are saved under other names."""
        return weights.keys() <= {name for name, _ in self.student.module.named_parameters()}

    def engine_of(self, weights: Mapping[str, Tensor]) -> Sampler:
        """The student with other weights, by their names, in this process whoever samples for it."""
        own = self.optimizer.own_parts(weights)
        read = {name: self.optimizer.as_read(weight.to(self.student.device)) for name, weight in own.items()}
        return HFEngine(self.student, max_tokens_per_batch=self.recipe.sampling.max_tokens_per_batch, weights=read)

    def _of_teacher(self, viewer: Viewer, problems: Sequence[Problem], step: int) -> list[Group]:
        read = self._read_by_teacher(viewer, problems, step)
        with viewer.teacher.active():
            engine, renderer = viewer.teacher.engine(), viewer.teacher.renderer
            write = partial(self._sampled, engine, renderer, problems, step, read)
            groups = groups_of(problems, self.ranks.from_all(write))
        return [written_by("teacher", read_by(self.renderer, group)) for group in groups]

    def _read_by_teacher(self, viewer: Viewer, problems: Sequence[Problem], step: int) -> dict[str, Sequence[int]]:
        """Problem id -> what the teacher reads while it answers: the context that it reads when it scores.

        Problems that give it nothing to read are missing: their answers leave the batch unscored, and are counted.
        """
        nothing = Rollout(
            problem_id="",
            sample_id=0,
            policy_version=step,
            prompt_ids=(),
            answer_ids=(),
            answer_logprobs=None,
            answer_mask=np.ones(0, dtype=np.bool_),
            finish="length",
        )
        groups = [Group(problem=p, rollouts=(replace(nothing, problem_id=p.id),)) for p in problems]
        identity = (self.recipe.seed, step, "context")
        views = build_views(groups, viewer.context, viewer.teacher.renderer, identity=identity)
        return {p.id: view.context_ids for p, view in zip(problems, views, strict=True) if view is not None}

    def _sampled(
        self,
        sampler: Sampler,
        renderer: Renderer,
        problems: Sequence[Problem],
        step: int,
        read: Mapping[str, Sequence[int]] | None = None,
        recipe: Recipe | None = None,
        version: int | None = None,
    ) -> Sequence[Answer]:
        recipe = recipe or self.recipe
        if self.stage is not None:
            self.stage.taken()  # what evaluations counted is theirs
        answers = sample_share(
            problems,
            sampler=sampler,
            renderer=renderer,
            task=self.task,
            params=self._params(recipe),
            group_size=recipe.sampling.group_size,
            identity=(self.recipe.seed, step, "sample"),
            policy_version=step if version is None else version,
            progress=self.progress,
            read=read,
            ranks=self.ranks,
            stage=self.stage,
        )
        if self.stage is not None:
            self._played.append(self.stage.taken())
        if isinstance(sampler, HFEngine):  # others do not say how they batch
            self._counts += sampler.counts
        return answers
