"""One math task for all tests of a worker process: its server takes a second or two to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from opdkit.tasks.math.task import MathTask


@pytest.fixture(scope="session")
def math_task() -> Iterator[MathTask]:
    task = MathTask(num_workers=2)
    yield task
    task.close()
