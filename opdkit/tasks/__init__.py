"""Problems and graders. No torch here: a saved run is re-graded on a laptop."""

from __future__ import annotations

from collections.abc import Callable

from opdkit.tasks.arithmetic import ArithmeticTask
from opdkit.tasks.base import Grade, Option, Task
from opdkit.tasks.code.task import CodeTask
from opdkit.tasks.math.task import MathTask
from opdkit.tasks.multiple_choice import MultipleChoiceTask
from opdkit.tasks.none import NoTask
from opdkit.tasks.shape import FormatTask, LengthTask
from opdkit.tasks.tool_use import ToolUseTask
from opdkit.tasks.weighted import WeightedTask

__all__ = ["TASKS", "Grade", "Option", "Task"]

# Made with their options, which are their keyword arguments (`options.py`); `guard.make_task` makes one of a recipe.
TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": ArithmeticTask,
    "code": CodeTask,
    "math": MathTask,
    "multiple_choice": MultipleChoiceTask,
    "tool_use": ToolUseTask,
    "weighted": WeightedTask,
    "format": FormatTask,
    "length": LengthTask,
    "none": NoTask,
}
