"""The trust-region teacher: initial and live logits mixed, asked like any other teacher."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.losses.heads import mixed_head
from opdkit.recipe import Recipe
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.student import load_student
from opdkit.training.models.teacher import TrustRegionTeacher, make_teacher
from opdkit.types import Asked

Make = Callable[..., Recipe]
CONTEXT, ANSWER = [[5, 9, 10], [6, 7]], [[11, 12, 13], [8]]
KEYS = ("teacher.kind=self", "teacher.weights=trust_region", "teacher.student_share=0.3")


def moved(recipe: Recipe) -> tuple[LanguageModel, Optimizer, Any]:
    """A student that has left its initial weights behind."""
    student = load_student(recipe)
    optimizer = Optimizer(student.module, recipe.train, compute_dtype=getattr(torch, recipe.model.dtype))
    teacher = make_teacher(recipe, recipe.teacher, student, optimizer)
    with torch.no_grad():
        for p in optimizer.weights.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return student, optimizer, teacher


def logits(model: LanguageModel, weights: Any = None) -> torch.Tensor:
    with torch.no_grad():
        hidden_NH = model.hidden(CONTEXT, ANSWER, weights=weights)
        head = model.head(weights)
        return head.logits(head.trimmed(hidden_NH.dtype).project(hidden_NH), 1.0)


@pytest.mark.parametrize("lora", [(), ("model.lora.r=4",)])
def test_the_head_gives_the_mixture(lora: tuple[str, ...], recipe: Make) -> None:
    """0.7 initial + 0.3 live logits, from models run on their own, to float32 rounding."""
    chosen = recipe("sdpo", *KEYS, *lora, "train.warmup_steps=0")
    student, _, teacher = moved(chosen)
    initial = load_student(chosen)
    expected_NV = 0.7 * logits(initial) + 0.3 * logits(student)
    signals = teacher.score(CONTEXT, ANSWER, Asked("distribution"), temperature=1.0)
    head, hidden_NH = teacher.head(), torch.cat([signal.hidden_TH for signal in signals])
    assert hidden_NH.shape[-1] == 2 * student.hidden_width and not head.weight_VH.requires_grad
    torch.testing.assert_close(
        head.logits(head.trimmed(torch.float32).project(hidden_NH), 1.0), expected_NV, rtol=0, atol=2e-5
    )


def test_it_answers_whatever_a_model_answers(recipe: Make) -> None:
    """Sampled log-probs, top-k and entropy are those of the mixture, at the loss temperature."""
    chosen = recipe("sdpo", *KEYS, "train.warmup_steps=0")
    student, _, teacher = moved(chosen)
    logprob_NV = ((0.7 * logits(load_student(chosen)) + 0.3 * logits(student)) / 0.8).log_softmax(-1)
    signals = teacher.score(CONTEXT, ANSWER, Asked("topk", 3, entropy=True), temperature=0.8)
    said = {
        name: torch.cat([torch.from_numpy(getattr(s, name)) for s in signals])
        for name in ("sampled_logprob_T", "topk_ids_TK", "topk_logprob_TK", "entropy_T")
    }
    ids_N = torch.tensor([token for answer in ANSWER for token in answer])
    close: Any = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(said["sampled_logprob_T"], logprob_NV.gather(-1, ids_N[:, None])[:, 0], **close)
    torch.testing.assert_close(said["topk_logprob_TK"], logprob_NV.topk(3).values, **close)
    torch.testing.assert_close(said["topk_logprob_TK"], logprob_NV.gather(-1, said["topk_ids_TK"]), **close)
    torch.testing.assert_close(said["entropy_T"], -(logprob_NV.exp() * logprob_NV).sum(-1), **close)


def test_its_anchor_survives_a_checkpoint(recipe: Make) -> None:
    """After a resume the module holds moved weights: the initial ones come from the checkpoint."""
    chosen = recipe("sdpo", *KEYS, "train.warmup_steps=0")
    student, optimizer, teacher = moved(chosen)
    asked = Asked("sampled")
    before = teacher.score(CONTEXT, ANSWER, asked, temperature=1.0)
    fresh = make_teacher(chosen, chosen.teacher, student, optimizer)  # takes the moved weights for the initial ones
    assert fresh is not None
    assert (
        fresh.score(CONTEXT, ANSWER, asked, temperature=1.0)[0].sampled_logprob_T != before[0].sampled_logprob_T
    ).any()
    fresh.load_state(teacher.state())
    for row, signal in enumerate(fresh.score(CONTEXT, ANSWER, asked, temperature=1.0)):
        assert (signal.sampled_logprob_T == before[row].sampled_logprob_T).all()


def test_what_no_head_mixes_is_refused() -> None:
    """A soft cap is not linear: refused by name for a model, as an internal fault for two heads."""
    capped = Head(weight_VH=torch.eye(3), num_tokens=3, softcap=30.0)
    model: Any = SimpleNamespace(head=lambda: capped, name="gemma")
    with pytest.raises(UserError, match=r'gemma soft-caps them.*use teacher.weights = "ema"'):
        TrustRegionTeacher(model, None, None, 1, student_share=0.1)  # type: ignore[arg-type]
    for other in (capped, Head(weight_VH=torch.eye(3), num_tokens=3, logit_scale=2.0)):
        with pytest.raises(ValueError, match="no head mixes"):
            mixed_head(Head(weight_VH=torch.eye(3), num_tokens=3), other, 0.5)


def test_mixed_head_by_hand() -> None:
    """Hidden (1, 0) and (0, 1), heads 2 and 4 times the identity with biases 1 and 3, share 0.25: logits
    0.75 (2, 0) + 0.25 (0, 4) + 0.75 + 0.75 = (3, 2.5)."""
    heads = [
        Head(weight_VH=scale * torch.eye(2), num_tokens=2, bias_V=torch.full((2,), bias))
        for scale, bias in ((2.0, 1.0), (4.0, 3.0))
    ]
    mixed = mixed_head(*heads, 0.25)
    assert mixed.project(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist() == [[3.0, 2.5]]


def test_ids_that_the_student_lacks_are_lacking_in_its_mixtures() -> None:
    """A view of another model may limit the student's ids: a trust-region teacher beside it gives them no probability
    either, or the two could not be compared."""
    head = Head(weight_VH=torch.eye(3), num_tokens=3, absent_ids=torch.tensor([1]))
    mixed = mixed_head(head, head, 0.5)
    assert mixed.logits(mixed.project(torch.zeros(1, 6)), 1.0).softmax(-1).tolist() == [[0.5, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.weights=trust_region"], "set both"),
        (["teacher.student_share=0.1"], "set both"),
        (["teacher.weights=trust_region", "teacher.student_share=1.0"], "less than 1"),
        (["teacher.weights=ema", "teacher.ema_rate=0.1", "teacher.student_share=0.1"], "or neither"),
    ],
)
def test_refused_recipes(overrides: list[str], words: str, recipe: Make) -> None:
    with pytest.raises(UserError, match=words):
        recipe("sdpo", "train.warmup_steps=0", "teacher.kind=self", *overrides)


def test_a_mixture_writes_no_answers(recipe: Make) -> None:
    with pytest.raises(UserError, match="cannot write them"):
        recipe("sft", *KEYS, "method.answers=teacher")
