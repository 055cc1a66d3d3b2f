"""Several named views in a run: the gradient of the target's definition, readings that repeat, resume, refusals.

What methods make of views: tests/methods. What the loss makes of targets: tests/losses/test_targets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from opdkit import losses
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows, save_rows
from opdkit.training import step
from opdkit.training.loop import TrainingRun, train
from opdkit.training.models.optimizer import StepResult
from opdkit.training.models.student import load_student
from opdkit.training.saved import checkpoint
from opdkit.types import Asked, Example, Needs

Make = Callable[..., Recipe]
INITIAL = "{ kind = 'self', weights = 'initial' }"
SOLUTION = "{ kind = 'reference_solution', template = 'prefix' }"
# The published sentences hold characters that the tiny tokenizer does not know.
WORDING = "{ layout = '{question}{success}', success = ';{text}' }"
PEERS = f"{{ kind = 'peers', slots = ['success'], feedback = 'never', wording = {WORDING} }}"
EXTRAPOLATED = (
    f"views.reference={{ teacher = {INITIAL}, context = {SOLUTION} }}",
    "method.target={ teacher = 1.25, reference = -0.25 }",
)


def move(run: TrainingRun) -> None:
    """The student leaves its initial weights behind."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in run.parts.optimizer.weights.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=random))


def not_applied(run: TrainingRun, patch: pytest.MonkeyPatch) -> tuple[list[Example], dict[str, Tensor]]:
    """(rows, gradient) of a step that is not applied."""
    seen: dict[str, Tensor] = {}

    def catch(_: int) -> StepResult:
        for name, weight in run.parts.optimizer.weights.items():
            seen[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    patch.setattr(run.parts.optimizer, "step", catch)
    rows, _ = step.train_step(run.state, run.problems[:4])
    return rows, seen


def logprobs(model: LanguageModel, contexts: list[Any], answers: list[Any]) -> Tensor:
    """[N, V] of all answer tokens, from the bare module and one row at a time."""
    rows = []
    for context, answer in zip(contexts, answers, strict=True):
        logits = model.module(input_ids=torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1]
        rows.append(logits[:, : model.num_tokens].log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("support", ["full", "sampled"])
@pytest.mark.parametrize("max_tokens", [40, 100_000])
def test_extrapolation_has_the_gradient_of_its_definition(
    support: str, max_tokens: int, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target softmax(1.25 teacher - 0.25 reference), where the reference is the initial student and reads the solution:
    autograd of the mean KL(student || target), or of the sampled token's estimate, through bare modules, to 1e-5."""
    chosen = recipe("opd", f"method.support={support}", *EXTRAPOLATED)
    run = start(chosen)
    move(run)
    run.state.passes = replace(run.state.passes, max_tokens=max_tokens)
    rows, got = not_applied(run, monkeypatch)

    def read(view: str) -> list[Any]:
        return [row.views[view].context_ids for row in rows]

    assert read("teacher") == [row.rollout.prompt_ids for row in rows] != read("reference")
    answers, parts = [row.rollout.answer_ids for row in rows], run.parts
    with torch.no_grad():
        teacher_NV = logprobs(parts.teacher.model, read("teacher"), answers)
        reference_NV = logprobs(load_student(chosen), read("reference"), answers)
    student_NV = logprobs(parts.student, [row.rollout.prompt_ids for row in rows], answers)
    mixed_NV = 1.25 * teacher_NV - 0.25 * reference_NV
    if support == "full":
        loss = (student_NV.exp() * (student_NV - mixed_NV.log_softmax(-1))).sum(-1).mean()
    else:
        ids_N1 = torch.tensor([token for answer in answers for token in answer])[:, None]
        said_N, wanted_N = student_NV.gather(-1, ids_N1), mixed_NV.gather(-1, ids_N1)
        loss = -((wanted_N - said_N.detach()) * said_N).mean()
    expected = torch.autograd.grad(loss, list(parts.optimizer.weights.values()))
    flat, wanted = (torch.cat([g.flatten().double() for g in grads]) for grads in (got.values(), expected))
    assert wanted.norm() > 0 and (flat - wanted).norm() / wanted.norm() < 1e-5


class Hinted(Method):
    """Learns the sampled token as much as two hints of other peers like it more than the teacher does."""

    name: Literal["hinted"] = "hinted"

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled"), "hint": Asked("sampled")})

    def terms(self, plan: PlanInputs) -> list[losses.Term]:
        Seen.readings = plan.readings("hint")
        hint_N = torch.stack(Seen.readings).nanmean(0)
        coef_N = plan.coefficients("token", views=("hint",))
        advantage_N = (hint_N - plan.view_logprob["teacher"]).nan_to_num()
        return [losses.Term(name="hinted", loss=losses.PolicyGradient(), coef_N=coef_N, advantage_N=advantage_N)]


class Seen:
    readings: list[Tensor]


def test_a_view_that_repeats_shows_other_evidence_each_time(
    recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two readings with one success each. Of the rewards 1, 1, 0, 0 the failures read both right answers, one a
    reading, and the right ones each other alone: their second reading is missing, NaN to the method, and no
    row is lost."""
    monkeypatch.setitem(METHODS, "hinted", Hinted)
    hint = f"views.hint={{ teacher = {INITIAL}, context = {PEERS}, count = 2 }}"
    run = start(recipe("hinted", f"teacher={INITIAL}", hint, "sampling.group_size=4", "diagnostics.every=0"))
    sample = run.state.sample
    run.state.sample = lambda problems, number: [
        replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id < 2)) for r in g.rollouts))
        for g in sample(problems, number)
    ]
    rows, metrics = step.train_step(run.state, run.problems[:3])
    numbers = {metric.name: metric.value for metric in metrics}
    for row in rows:
        wrong = row.rollout.sample_id >= 2
        names = [name for name in ("hint.0", "hint.1") if name in row.views]
        assert names == ["hint.0", "hint.1"][: 1 + wrong] and set(row.signals) == {"teacher", *names}
        shown = [source for name in names for source in row.views[name].sources]
        own = row.rollout.problem_id
        right = {(own, 0), (own, 1)}
        assert set(shown) == (right if wrong else right - {row.rollout.key}) and len(shown) == len(set(shown))
    first_N, second_N = Seen.readings
    of_wrong_N = torch.cat([torch.full((len(r.rollout.answer_ids),), r.rollout.sample_id >= 2) for r in rows])
    assert not first_N.isnan().any() and torch.equal(second_N.isnan(), ~of_wrong_N)
    said = [row.signals["hint.1"].sampled_logprob_T for row in rows if row.rollout.sample_id >= 2]
    torch.testing.assert_close(second_N[of_wrong_N], torch.from_numpy(np.concatenate(said)))  # type: ignore[arg-type]
    assert numbers["views/hint/num_rows_without_view"] == 0 and numbers["loss/hinted_tokens"] == len(of_wrong_N)
    read = [len(v.context_ids) + len(r.rollout.answer_ids) for r in rows for n, v in r.views.items() if n != "teacher"]
    assert numbers["views/hint/tokens"] == sum(read)

    save_rows(tmp_path / "rows.parquet", rows)
    for row, back in zip(rows, load_rows(tmp_path / "rows.parquet"), strict=True):
        assert back.views == {name: replace(view, shown=()) for name, view in row.views.items()}
        assert back.signals.keys() == row.signals.keys()


def files(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "step_000004"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_two_views_resume_to_the_same_bits(recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EMA teacher and an anchor at the initial weights, each with state of its own: a run that dies in its third
    step, a step behind its checkpoint, ends as one that did not."""
    keys = ("teacher={ kind = 'self', weights = 'ema', ema_rate = 0.1 }", *EXTRAPOLATED, f"context={SOLUTION}")
    keys = (*keys, "train.steps=4", "train.save_every=2")
    whole = recipe("opd", *keys, "name=whole")
    train(whole, console=console)
    saved = checkpoint.latest(whole.run_dir / "checkpoints")
    assert saved is not None
    kept = saved.tensors("teacher")
    of_reference = {name for name in kept if name.startswith("views.reference/")}
    assert of_reference and len(of_reference) == len(kept) / 2
    name = min(of_reference)
    assert not torch.equal(kept[name], kept[name.removeprefix("views.reference/")])

    dying, original, calls = recipe("opd", *keys, "name=dying"), step.backward, []

    def die(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the power fails")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "backward", die)
        with pytest.raises(RuntimeError, match="the power fails"):
            train(dying, console=console)
    train(dying, console=console, resume=True)
    assert files(dying.run_dir) == files(whole.run_dir)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["method.target={ teacher = 1.25, reference = -0.25 }"],
            'method.name = "opd" asks the view "reference", which is not there; add [views.reference] with teacher and '
            "context",
        ),
        (
            [*EXTRAPOLATED, "method.target={ teacher = 1.25, refrence = -0.25 }"],
            'asks the view "refrence", which is not there; add [views.refrence] with teacher and context; did you mean '
            '"reference"?',
        ),
        (
            [EXTRAPOLATED[0]],
            '[views.reference] is not used by method.name = "opd"; remove it, or name it in method.target '
            "or method.mixture",
        ),
        (
            [f"views.teacher={{ teacher = {INITIAL} }}"],
            "[views.teacher] cannot be the name of a view; use letters, digits and _, and not teacher: [teacher] and "
            "[context] are that view",
        ),
        ([f"views={{ 'a.0' = {{ teacher = {INITIAL} }} }}"], "[views.a.0] cannot be the name of a view"),
        (
            [f"views.reference={{ context = {SOLUTION} }}", EXTRAPOLATED[1]],
            "views.reference.teacher is missing: say who reads, e.g. { kind",
        ),
        (
            ["teacher={ kind = 'none' }", f"views.reference={{ teacher = {INITIAL} }}", EXTRAPOLATED[1]],
            'method.name = "opd" needs a teacher, but teacher.kind = "none"',
        ),
    ],
    ids=["missing", "misspelt", "never asked", "teacher", "no name", "nobody", "no teacher"],
)
def test_refused(overrides: list[str], sentence: str, recipe: Make) -> None:
    """In a sentence, before a model is loaded."""
    with pytest.raises(UserError) as refusal:
        recipe("opd", *overrides)
    assert sentence in str(refusal.value)


def test_a_target_needs_no_view_called_teacher(recipe: Make) -> None:
    """What reads is a matter of names: without [teacher], a target of another view alone is whole."""
    chosen = recipe("opd", "teacher={ kind = 'none' }", f"views.hint={{ teacher = {INITIAL}, context = {SOLUTION} }}",
                    "method.target={ hint = 1.0 }")  # fmt: skip
    assert list(chosen.all_views) == ["hint"] and chosen.needs.views == {"hint": Asked("distribution")}
