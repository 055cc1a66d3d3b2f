"""Several views of one answer in a training step: what is asked, what is scored once, and what the target is."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step

Make = Callable[..., Recipe]
LAYOUT = "'{question}{success}{another}{failure}'"
KINDS = ("success", "another", "failure", "feedback", "summary", "failed_summary")
WORDING = f"{{ layout = {LAYOUT}, {', '.join(f'{kind} = {chr(39)};{{text}}{chr(39)}' for kind in KINDS)} }}"
SOLUTION = "{ kind = 'reference_solution', template = 'prefix' }"
PEERS = f"{{ kind = 'peers', slots = ['success'], feedback = 'never', wording = {WORDING} }}"


def started(recipe: Recipe, console: Console) -> TrainingRun:
    """A run whose student has left its initial weights behind."""
    run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, console)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in run.parts.optimizer.weights.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=random))
    return run


def gradient(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What one step would apply, as one array."""
    seen: list[Tensor] = []
    weights = run.parts.optimizer.weights

    def catch(step: int) -> StepResult:
        seen.extend(torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights.values())
        return StepResult(0.0, False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    train_step(run.state, run.problems[:6])
    return torch.cat(seen)


@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_trust_region_is_a_target_of_two_views(
    support: str, recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 initial + 0.3 live logits, asked as one teacher or as two views of one context: the same gradient."""
    asked = ("method.support=" + support, *(("method.k=8",) if support != "full" else ()), f"context={SOLUTION}")
    one = recipe("opd", "teacher={ kind = 'self', weights = 'trust_region', student_share = 0.3 }", *asked)
    two = recipe(
        "opd",
        "teacher={ kind = 'self', weights = 'initial' }",
        f"views.live={{ teacher = {{ kind = 'self', weights = 'live' }}, context = {SOLUTION} }}",
        "method.target={ teacher = 0.7, live = 0.3 }",
        *asked,
    )
    first, second = (gradient(started(each, console), monkeypatch) for each in (one, two))
    assert first.norm() > 0
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5 * float(first.abs().max()))


def test_what_views_read_alike_is_scored_once(recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views of one teacher and one context: half of the target each is the whole of it, and each answer is read
    once. A third one that reads the solution is scored apart."""
    halves = (
        "method.target={ teacher = 0.5, again = 0.5 }",
        "views.again.teacher={ kind = 'self', weights = 'initial' }",
    )
    own = ("teacher={ kind = 'self', weights = 'initial' }",)
    plain, twice = recipe("opd", *own), recipe("opd", *own, *halves)
    expected = gradient(started(plain, console), monkeypatch)
    run = started(twice, console)
    assert len(run.state.teachers) == 1
    read: list[int] = []
    score = run.state.teachers[0].score

    def counting(contexts: Sequence[Sequence[int]], *rest: Any, **options: Any) -> Any:
        read.append(len(contexts))
        return score(contexts, *rest, **options)

    monkeypatch.setattr(run.state.teachers[0], "score", counting)
    got = gradient(run, monkeypatch)
    num_rows = 6 * twice.sampling.group_size
    assert sum(read) == num_rows
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_views_that_no_loss_can_read_are_refused(recipe: Make) -> None:
    """A target has one reading of each view, and a view is asked by somebody: both are refused before models load."""
    wrong = PEERS.replace("['success']", "['failure']")
    asked = (
        "sampling.group_size=4",
        "views.wrong={ teacher = { kind = 'self', weights = 'live' }, count = 3, context = " + wrong + " }",
    )
    with pytest.raises(UserError, match=r"views.wrong.count = 3: the view repeats"):
        recipe("opd", "method.target={ teacher = 1.0, wrong = 0.1 }", *asked)
    with pytest.raises(UserError, match=r"\[views.wrong\] is not used by method.name = \"opd\""):
        recipe("opd", *asked)
