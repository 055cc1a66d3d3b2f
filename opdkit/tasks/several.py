"""Graders side by side, where the sets of `data.train` name several: each answers for the problems of its task.

No name in a recipe: it is made of those that the sets name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from opdkit.tasks.base import Grade, Task
from opdkit.tasks.options import ChosenTask, TaskOptions
from opdkit.types import Problem


class SeveralTasks:
    name = "several"

    def __init__(self, *, tasks: Mapping[str, Task]) -> None:
        """tasks: by `Problem.task`."""
        self._tasks = dict(tasks)

    @property
    def main(self) -> Task:
        mains = {name: getattr(task, "main", task) for name, task in self._tasks.items()}
        return self if mains == self._tasks else SeveralTasks(tasks=mains)

    @property
    def stats(self) -> Mapping[str, Any]:
        return {name: task.stats for name, task in self._tasks.items() if hasattr(task, "stats")}

    def describe(self) -> dict[str, Any]:
        return {name: task.describe() for name, task in self._tasks.items() if hasattr(task, "describe")}

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        grades: dict[int, Grade] = {}
        for name, task in self._tasks.items():
            own = [place for place, (problem, _) in enumerate(items) if problem.task == name]
            if own:
                grades |= zip(own, task.grade([items[place] for place in own]), strict=True)
        return [grades[place] for place in range(len(items))]

    def close(self) -> None:
        for task in self._tasks.values():
            task.close()


class SeveralOptions(TaskOptions):
    """The options of them all."""

    name: str = SeveralTasks.name
    tasks: Mapping[str, ChosenTask]  # by the name of the main one, which is the problems' `task`; none: nobody grades
    factory: ClassVar[Callable[..., Task]] = SeveralTasks

    @property
    def graders(self) -> dict[str, TaskOptions]:
        return {name: task for name, task in self.tasks.items() if not task.is_none}

    @property
    def main(self) -> TaskOptions:
        mains = {name: task.main for name, task in self.tasks.items()}
        return self if mains == self.tasks else SeveralOptions(tasks=mains)

    @property
    def user_files(self) -> dict[str, str]:
        return {name: digest for task in self.graders.values() for name, digest in task.user_files.items()}

    @property
    def bounds(self) -> tuple[float, float]:
        lowest, highest = zip(*(task.bounds for task in self.graders.values()), strict=True)
        return min(lowest), max(highest)

    def can_grade(self, problem: Problem) -> bool:
        task = self.graders.get(problem.task)
        return task is not None and task.can_grade(problem)

    def make(self) -> Task:
        return SeveralTasks(tasks={name: task.make() for name, task in self.graders.items()})

    def warnings(self, where: str) -> list[str]:
        return [sentence for task in self.graders.values() for sentence in task.warnings(where)]

    def _needs(self, what: str) -> bool:
        return any(task._needs(what) for task in self.graders.values())


def side_by_side(tasks: Sequence[TaskOptions]) -> TaskOptions:
    """Their one grader. Raises ValueError for two of one name with other options: an answer would have two graders."""
    found: dict[str, TaskOptions] = {}
    for task in tasks:
        if found.setdefault(task.main.name, task) != task:
            raise ValueError(
                f"two sets are graded by {task.main.name} with other options ({found[task.main.name].text}; "
                f"{task.text}); give both the same"
            )
    return tasks[0] if len(found) == 1 else SeveralOptions(tasks=found)
