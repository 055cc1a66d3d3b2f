"""The fixture of the loss tests."""

import pytest
from loss_world import World, make_world


@pytest.fixture
def world() -> World:
    return make_world()
