from pathlib import Path

import pytest
from hostile_run import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run whose every word was chosen by somebody hostile."""
    write_run(tmp_path / "run")
    return tmp_path / "run"
