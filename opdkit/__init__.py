"""opdkit: post-train language models by on-policy distillation.

    import opdkit

    run = opdkit.train("recipe.toml", reward=my_reward)
    run.rows()

Names load on first use: importing this imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036  (of a clone; pip looks before it installs)
    raise ImportError(
        f"opdkit needs Python 3.11 or newer, and this is {sys.version_info[0]}.{sys.version_info[1]}: {sys.executable}"
    )

if TYPE_CHECKING:
    from opdkit import losses
    from opdkit.api.commands import evaluate, fit, report, sample, train
    from opdkit.api.run import Run
    from opdkit.recipe import Recipe, load_recipe

__version__ = "0.2.0.dev0"
__all__ = ["Recipe", "Run", "evaluate", "fit", "load_recipe", "losses", "report", "sample", "train"]

_HOME = {"Recipe": "recipe", "load_recipe": "recipe", "Run": "api.run"}  # the rest is in api.commands


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "losses":
        return importlib.import_module("opdkit.losses")
    home = importlib.import_module(f"opdkit.{_HOME.get(name, 'api.commands')}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
