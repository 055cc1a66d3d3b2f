"""From what Python has as a reward to the task of a recipe."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks.options import TaskOptions, in_process, resolve_task
from opdkit.tasks.user.rewards import is_reward_function, reward_faults

RewardFunction = Callable[..., Any]
Reward = RewardFunction | str  # or the name of a task


def task_of(reward: Reward | Sequence[Reward] | Mapping[str, Reward | tuple[float, Reward]]) -> TaskOptions:
    """One function of TRL's form or a task's name; several are a sum of weight 1 each, under their own names; a
    mapping says names, and weights as (weight, reward). The first is what an evaluation measures.

    A function that can be imported from a file is graded in a process of its own, under that file's name; any other in
    this process. Raises UserError for what is no reward.
    """
    if callable(reward) or isinstance(reward, str):
        return _one(reward)
    if isinstance(reward, Mapping):
        named = dict(reward)
    elif isinstance(reward, Sequence):
        if any(isinstance(one, tuple) for one in reward):
            raise UserError("a list of rewards has no weights; give a dict, {name: (0.5, function)}")
        named = {_name(one): one for one in reward}
        if len(named) < len(reward):
            raise UserError("two of the rewards have one name; give a dict, {name: function}")
    else:
        raise UserError(f"reward is {type(reward).__name__}; give a function, a list of them, or {{name: function}}")
    weighed = {name: one if isinstance(one, tuple) else (1.0, one) for name, one in named.items()}
    for name, pair in weighed.items():
        if len(pair) != 2 or isinstance(pair[0], bool) or not isinstance(pair[0], Real):
            raise UserError(f"the reward {name} = {pair!r:.100}: a weight goes before its reward, (0.5, function)")
    terms = {name: {"weight": float(weight), "task": _one(one)} for name, (weight, one) in weighed.items()}
    return _resolved({"name": "weighted", "terms": terms}, "reward")


def _one(reward: Reward) -> TaskOptions:
    if isinstance(reward, str):
        return _resolved(reward, f"reward = {reward!r}")
    name = _name(reward)
    if inspect.isclass(reward) or not callable(reward) or not is_reward_function(reward):
        raise UserError(
            f"the reward {name} does not take completions; write def {name}(completions, **kwargs), which returns a "
            "list of numbers"
        )
    if fault := reward_faults(reward, name):
        raise UserError(fault)
    where = _file_or_module(reward)
    return in_process(reward, name) if where is None else _resolved(f"{where}:{name}", f"the reward {name}")


def _resolved(value: Any, what: str) -> TaskOptions:
    try:
        return resolve_task(value)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def _name(reward: Reward) -> str:
    return reward if isinstance(reward, str) else str(getattr(reward, "__name__", type(reward).__name__))


def _file_or_module(function: RewardFunction) -> str | None:
    """Where another process finds the function, as `task = ...` names it; None: nowhere, or only in the script that is
    running, which would run again."""
    module = sys.modules.get(str(getattr(function, "__module__", None)))
    name = _name(function)
    file = getattr(module, "__file__", None)
    if module is None or module.__name__ == "__main__" or not file or not str(file).endswith(".py"):
        return None
    if vars(module).get(name) is not function or not Path(file).is_file():
        return None
    if "." in module.__name__ and importlib.util.find_spec(module.__name__) is not None:
        return module.__name__
    here, path = Path.cwd(), Path(file).resolve()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
