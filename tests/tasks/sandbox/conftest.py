"""One sandbox for all tests that need no particular one: it takes a second or two to start."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from opdkit.tasks.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    if sys.platform != "linux":
        pytest.skip("the sandbox exists on Linux only")
    sandbox = Sandbox(num_slots=2)
    yield sandbox
    sandbox.close()
