"""Where a teacher's weights are, and in how many bits. Moves between devices are watched, not made."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opdkit.errors import UserError
from opdkit.losses import head_stats
from opdkit.recipe import Recipe, check_installed
from opdkit.training.models.other_models import OtherModel
from opdkit.training.step import train_step
from opdkit.types import Asked

Make = Callable[..., Recipe]
SMALL = ("train.problems_per_step=2", "sampling.max_answer_tokens=8")


def student_after(run: Any, steps: int = 2) -> torch.Tensor:
    for _ in range(steps):
        train_step(run.state, run.problems[:2])
    return torch.cat([p.detach().flatten() for p in run.parts.student.module.parameters()])


@pytest.mark.parametrize("method", [(), ("method.support=sampled",)])
@pytest.mark.parametrize("placement", ["cpu", "reload"])
def test_the_numbers_do_not_depend_on_where_it_waits(
    placement: str, method: tuple[str, ...], recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; between questions it is in host memory, or nowhere."""
    here = student_after(start(recipe("opd", *SMALL, *method)))
    run = start(recipe("opd", *SMALL, *method, f"teacher.placement={placement}"))
    other = run.parts.teacher._whose
    moves: list[Any] = []
    loads: list[int] = []
    if placement == "cpu":
        to = nn.Module.to
        watched = other.loaded.module
        monkeypatch.setattr(
            nn.Module, "to", lambda self, *a, **k: (self is watched and moves.append(a[0]), to(self, *a, **k))[1]
        )
    else:
        assert other.loaded is None and run.parts.teacher.max_positions == 96
        call = OtherModel.__call__
        monkeypatch.setattr(
            OtherModel, "__call__", lambda self: (self.loaded is None and loads.append(1), call(self))[1]
        )
    assert torch.equal(here, student_after(run))
    if placement == "cpu":
        assert [str(place) for place in moves] == ["cpu", "cpu"] * 2  # there and back, twice
    else:
        assert len(loads) == 2 and other.loaded is None


def test_keys_that_do_not_go_together_are_refused(recipe: Make) -> None:
    for overrides, said in {
        ("teacher.quantization=int8", "teacher.placement=cpu"): "reload",
        ("teacher.tokens=align", "teacher.placement=reload", "method.support=sampled"): "another tokenizer",
    }.items():
        with pytest.raises(UserError, match=said):
            recipe("opd", *overrides)
    with pytest.raises(UserError, match=r"only read with teacher.kind = \"model\""):
        recipe("opsd", "teacher.quantization=int8")


def test_a_package_that_is_not_there_is_said(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `check` and `train`, with what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4.*bitsandbytes.*pip install"):
        check_installed(recipe("opd", "teacher.quantization=nf4"))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_teacher_is_close_and_small(kind: str, recipe: Make, start: Any, models: Any) -> None:
    """Its head stays as it is; what it says is near what the whole teacher says. Needs torchao."""
    pytest.importorskip("torchao")
    whole, small = (
        start(recipe("opd", *SMALL, *more)).parts.teacher for more in ((), (f"teacher.quantization={kind}",))
    )
    context, answer = [(5, 6, 7)], [(8, 9, 10, 11)]
    said = [t.score(context, answer, Asked("distribution"), temperature=1.0)[0] for t in (whole, small)]
    ids = torch.tensor(answer[0])
    logprobs = [head_stats(s.hidden_TH, s.head, sampled_ids_N=ids).sampled_logprob_N for s in said]
    assert 0 < float((logprobs[0] - logprobs[1]).abs().max()) < 0.3
    assert small.head().weight_VH.dtype == torch.float32
