"""`import opdkit`: the public names, which load late and which no submodule replaces."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import opdkit

FUNCTIONS = ("evaluate", "fit", "load_recipe", "report", "sample", "train")


def test_nothing_heavy_loads_with_the_package_or_with_a_recipe() -> None:
    """`opdkit.load_recipe` and `opdkit.Run` need no torch and no pandas either."""
    code = (
        "import sys, opdkit; opdkit.load_recipe; opdkit.Recipe; opdkit.Run; opdkit.train; opdkit.losses; "
        "bad = {'torch', 'transformers', 'pandas', 'datasets', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_submodule_replaces_a_function() -> None:
    """After every submodule was imported, by name and by attribute, each name is what it was: asked for twice."""
    code = """
import importlib, pkgutil, types, opdkit
first = {name: getattr(opdkit, name) for name in opdkit.__all__}
skip = ("opdkit.tasks.sandbox.", "opdkit.__main__", "opdkit.cli.__main__", "opdkit.tasks._worker",
        "opdkit.engines.servers.in_vllm.", "opdkit.losses.kernels.triton_kernels")
for found in pkgutil.walk_packages(opdkit.__path__, "opdkit."):
    if not found.name.startswith(skip):
        importlib.import_module(found.name)
for name in opdkit.__all__:
    assert getattr(opdkit, name) is first[name], name
    for attempt in range(2):
        if name in ("train", "evaluate", "sample", "fit", "report", "load_recipe"):
            assert isinstance(getattr(opdkit, name), types.FunctionType), name
            try:
                getattr(opdkit, name)()
            except TypeError as error:
                assert "missing" in str(error), error
assert isinstance(opdkit.run, types.ModuleType) and isinstance(opdkit.Run, type)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_are_functions_with_a_docstring(name: str) -> None:
    function = getattr(opdkit, name)
    assert isinstance(function, types.FunctionType) and function.__doc__
    assert name in dir(opdkit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        opdkit.trian  # noqa: B018
