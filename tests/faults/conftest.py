"""The warm process, and the recipe of a run that has something of everything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from opdkit import toml

sys.path.append(str(Path(__file__).parent))
from harness import HERE, RECIPE, Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are put under a process by a C library: Linux and a C compiler are needed")
    folder = tmp_path_factory.mktemp("warm")
    library = folder / "file_events.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "file_events.c"), "-ldl"], check=True
    )
    one = Warm(folder, library)
    yield one
    one.close()


@pytest.fixture(scope="session")
def write_recipe(models: dict[str, Path]) -> Callable[..., Path]:
    """Writes recipe.toml into a folder: a run with a LoRA student, an averaged teacher, a selection of tokens, measured
    pass rates, a schedule, evaluations, and two updates a step."""

    def write(folder: Path, **sections: Mapping[str, Any] | Any) -> Path:
        raw = {**RECIPE, "model": {**RECIPE["model"], "path": str(models["student"])}}
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values} if isinstance(values, Mapping) else values
        path = folder / "recipe.toml"
        path.write_text(toml.dumps({key: value for key, value in raw.items() if value is not None}))
        return path

    return write
