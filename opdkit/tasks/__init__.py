"""Problems and graders. No torch here: a saved run is re-graded on a laptop."""

from __future__ import annotations

from collections.abc import Callable

from opdkit.tasks.arithmetic import ArithmeticTask
from opdkit.tasks.base import Task
from opdkit.tasks.code import CodeTask
from opdkit.tasks.math import MathTask

TASKS: dict[str, Callable[[], Task]] = {"arithmetic": ArithmeticTask, "code": CodeTask, "math": MathTask}
