"""Where a step's answers come from: the student (on-policy), the data set, or the teacher (cold starts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress, Sampler
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.recipe import Recipe
from opdkit.tasks.base import Task
from opdkit.train.optimizer import Optimizer
from opdkit.train.rollouts import dataset_groups, read_by, sample_groups
from opdkit.train.teacher import Teacher
from opdkit.types import Group, Problem


@dataclass(slots=True)
class Answers:
    """Called with (problems, step) it returns graded groups. The prompts are always the student's."""

    recipe: Recipe
    student: LanguageModel
    renderer: Renderer
    optimizer: Optimizer
    teacher: Teacher | None
    task: Task
    progress: Progress | None = None  # hears of answers as they are finished

    def __call__(self, problems: Sequence[Problem], step: int) -> list[Group]:
        source = self.recipe.method.answer_source
        if source == "student":
            return self._sampled(self.student_engine(), self.renderer, problems, step)
        if source == "dataset":
            return dataset_groups(
                problems,
                renderer=self.renderer,
                stop_id=self.student.end_id,
                max_answer_tokens=self.recipe.sampling.max_answer_tokens,
                policy_version=step,
            )
        assert self.teacher is not None
        with self.teacher.active():
            groups = self._sampled(self.teacher.engine(), self.teacher.renderer, problems, step)
        return [read_by(self.renderer, group) for group in groups]

    def student_engine(self) -> HFEngine:
        """The student with the weights of this moment, as the computation reads them."""
        with torch.no_grad():
            weights = self.optimizer.compute_weights()
        return HFEngine(self.student, max_tokens_per_batch=self.recipe.sampling.max_tokens_per_batch, weights=weights)

    def _sampled(self, sampler: Sampler, renderer: Renderer, problems: Sequence[Problem], step: int) -> list[Group]:
        sampling = self.recipe.sampling
        return sample_groups(
            problems,
            sampler=sampler,
            renderer=renderer,
            task=self.task,
            params=sampling.params,
            group_size=sampling.group_size,
            identity=(self.recipe.seed, step, "sample"),
            policy_version=step,
            progress=self.progress,
        )
