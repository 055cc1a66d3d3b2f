"""Answers sampled ahead of their step: `sampling.lag`.

Step t learns from answers that the student gave when it had taken t - lag steps (0 for the first ones). So when step t
begins, with the weights of t steps, the answers to the problems of step t + lag are asked for; an engine of its own
writes them while the trainer scores and learns, the one in this process before. How old an answer is does not depend on
who is faster, and what is not used yet is part of every checkpoint: a resumed run has the same numbers.

Of several ranks each writes its share, beside its trainer or not. They tell each other at the end of a step, when no
pass over a model is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby

from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks
from opdkit.rollouts.single_turn import Answer, groups_of
from opdkit.types import Example, Group, Problem, Rollout, as_asked

Write = Callable[[], Sequence[Answer]]  # this rank's share, graded
# (problems, the step that learns from them, the step that the weights are of) -> what writes answers with the weights
# of this moment whenever it is called
Begin = Callable[[Sequence[Problem], int, int], Write]


@dataclass(slots=True)
class Ahead:
    """take(step) at the beginning of every step, wait() at its end.

    problems_of  the problems of a step
    is_beside    whether answers are written while the trainer works
    """

    lag: int
    num_steps: int
    begin: Begin
    problems_of: Callable[[int], Sequence[Problem]]
    is_beside: bool
    ranks: Ranks = ALONE
    _groups: dict[int, list[Group]] = field(default_factory=dict)  # by the step that learns from them
    _being_written: tuple[int, Future[Sequence[Answer]]] | None = None
    # One thread for the run: workers of a grader end with the thread that has started them.
    _thread: ThreadPoolExecutor | None = None

    def take(self, step: int) -> list[Group]:
        """The answers of this step."""
        self._groups = {later: groups for later, groups in self._groups.items() if later >= step}
        if step == 0:
            for early in range(min(self.lag, self.num_steps)):
                self._gather(early, self.begin(self.problems_of(early), early, 0))
        later = step + self.lag
        if later < self.num_steps:
            self._begin(later, step)
        if step not in self._groups:
            raise UserError(
                f"the checkpoint does not hold the answers of step {step}, which were sampled {self.lag} steps before; "
                "restore its files, or begin again with --overwrite"
            )
        return self._groups[step]

    def wait(self) -> None:
        """Until what is being written is there. Raises what went wrong with it."""
        if self._being_written is not None:
            (later, future), self._being_written = self._being_written, None
            self._gather(later, future.result)

    def waiting(self, step: int) -> dict[int, list[Example]]:
        """What steps from `step` on learn from, as a checkpoint keeps it; not what step `step` itself will sample."""
        kept = {later: groups for later, groups in self._groups.items() if step <= later < step + self.lag}
        return {
            later: [_row(group, one) for group in groups for one in group.rollouts] for later, groups in kept.items()
        }

    def restore(self, rows: Mapping[int, Sequence[Example]]) -> None:
        """What `waiting` gave, from a checkpoint. Raises UserError where it is not of these problems."""
        for step, examples in rows.items():
            problems = self.problems_of(step)
            # No step holds a problem twice, and all are answered equally often; an episode may have several rows.
            own = [[*rows] for _, rows in groupby(examples, key=lambda example: example.problem.id)]
            counts = {len({row.rollout.episode_id for row in part}) for part in own}
            if [part[0].problem.id for part in own] != [problem.id for problem in problems] or len(counts) > 1:
                raise UserError(
                    f"the checkpoint's answers of step {step} are not to the problems of that step: the data or the "
                    "recipe has changed"
                )
            self._groups[step] = [
                Group(problem=as_asked(problem, part[0].problem), rollouts=tuple(one.rollout for one in part))
                for problem, part in zip(problems, own, strict=True)
            ]

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _begin(self, later: int, version: int) -> None:
        write = self.begin(self.problems_of(later), later, version)
        if not self.is_beside:
            self._gather(later, write)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._being_written = later, self._thread.submit(write)

    def _gather(self, step: int, write: Write) -> None:
        self._groups[step] = groups_of(self.problems_of(step), self.ranks.from_all(write))


def _row(group: Group, rollout: Rollout) -> Example:
    return Example(problem=replace(group.problem, row={}), rollout=rollout)
