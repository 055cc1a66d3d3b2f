"""Top-k distillation: which modes go downhill, which recipes have a meaning, who is warned. Numbers: tests/parity."""

import io
import tomllib
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from opdkit import toml
from opdkit.cli import training
from opdkit.errors import UserError
from opdkit.losses import Divergence, Head, Term, ViewTokens, head_loss
from opdkit.losses.spec import EntryAdvantage, LossSpec, TeacherAdvantage
from opdkit.methods import METHODS
from opdkit.methods.topk_opd import TopkOPD
from opdkit.recipe import parse_recipe
from opdkit.types import Asked, Needs

MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "teacher": {"kind": "model", "path": "t"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 10},
}
# Percent of 1000 random pairs in which the step goes up (the full reverse KL, the full forward KL).
UPHILL = {
    ("student_topk", "student_p"): (0.0, 0.3),
    ("student_topk", "teacher_p"): (3.1, 0.0),
    ("student_topk", "none"): (9.0, 14.4),
    ("teacher_topk", "student_p"): (8.8, 0.0),
    ("teacher_topk", "teacher_p"): (4.0, 0.0),
    ("teacher_topk", "none"): (7.1, 1.1),
    ("intersection", "student_p"): (15.1, 0.5),
    ("intersection", "teacher_p"): (6.6, 0.1),
    ("intersection", "none"): (6.4, 0.4),
    ("union", "student_p"): (0.0, 0.2),
    ("union", "teacher_p"): (3.5, 0.0),
    ("union", "none"): (0.1, 0.0),
    ("symmetric_difference", "student_p"): (11.3, 20.4),
    ("symmetric_difference", "teacher_p"): (8.5, 2.2),
    ("symmetric_difference", "none"): (0.5, 0.3),
}


def method(**keys: Any) -> TopkOPD:
    made = METHODS["topk_opd"].model_validate({"name": "topk_opd", **keys})
    assert isinstance(made, TopkOPD)
    return made


@pytest.fixture(scope="module")
def gradient() -> Any:
    """Gradients with respect to the logits of 1000 students, each before a teacher that agrees with it to 0.7."""
    random = torch.Generator().manual_seed(0)
    pairs, size = 1000, 200
    teacher_NV = 2.0 * torch.randn(pairs, size, generator=random, dtype=torch.float64)
    own_NV = 2.0 * torch.randn(pairs, size, generator=random, dtype=torch.float64)
    student_NV = (0.7 * teacher_NV + (1 - 0.7**2) ** 0.5 * own_NV).requires_grad_()
    head = Head(weight_VH=torch.eye(size, dtype=torch.float64), num_tokens=size)

    def of(loss: LossSpec) -> Tensor:
        term = Term(name="loss", loss=loss, coef_N=torch.ones(pairs, dtype=torch.float64))
        teacher = ViewTokens(hidden_NH=teacher_NV, head=head)
        out = head_loss(student_NV, head, torch.zeros(pairs, dtype=torch.long), [term], teacher)
        return torch.autograd.grad(out.loss, student_NV)[0]

    return of


@pytest.mark.parametrize("mode", UPHILL)
def test_which_modes_go_downhill(mode: tuple[str, str], gradient: Any) -> None:
    """The table, as measured: a step goes uphill where its gradient and the full divergence's point apart. Random pairs
    overlap less than a student and its teacher do; what real lists do is not shown."""
    support, weight = mode
    step_NV = gradient(method(form="advantage", support=support, entry_weight=weight, k=16).loss)
    for kind, percent in zip(("reverse_kl", "forward_kl"), UPHILL[mode], strict=True):
        along_N = (step_NV * gradient(Divergence(kind))).sum(-1)
        assert 100 * (along_N < 0).double().mean().item() == pytest.approx(percent, abs=0.051)


def test_full_support_is_reverse_kl(gradient: Any) -> None:
    """Over the whole vocabulary the advantage weighted by p has exactly the gradient of KL(student || teacher)."""
    torch.testing.assert_close(
        gradient(method(form="advantage", support="full").loss), gradient(Divergence("reverse_kl")), rtol=0, atol=1e-14
    )


def test_warnings_say_which() -> None:
    """The symmetric difference and equal weights, as advantages; their divergences, and the other modes, not."""
    for form, support, weight in (
        *(("advantage", support, weight) for support, weight in UPHILL),
        ("advantage", "sampled", None),
        ("divergence", "symmetric_difference", None),
    ):
        keys = {"form": form, "support": support} | ({"entry_weight": weight} if weight else {})
        recipe = parse_recipe({**MINIMAL, "method": {"name": "topk_opd", **keys, **({"k": 4} if weight else {})}})
        said = list(recipe.method.warnings(recipe))
        doubtful = form == "advantage" and (support == "symmetric_difference" or weight == "none")
        assert len(said) == doubtful
        assert not said or "not always a descent direction" in said[0]


def test_check_warns_and_passes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`opdkit check` says the sentence, brackets and all, and does not refuse the recipe."""
    path = tmp_path / "r.toml"
    path.write_text(
        toml.dumps({**MINIMAL, "method": {"name": "topk_opd", "form": "advantage", "entry_weight": "none"}})
    )
    console = Console(width=400, record=True, file=io.StringIO())
    monkeypatch.setattr(training, "console", console)
    training.check([path])
    said = console.export_text()
    assert "ok " in said and 'warning method.form = "advantage" with support = "student_topk"' in said


def test_defaults_and_what_is_asked() -> None:
    """The published settings, but for the form; nothing ever asks for a pass of the student before the update."""
    recipe = parse_recipe({**MINIMAL, "method": {"name": "topk_opd"}})
    assert (recipe.sampling.group_size, recipe.train.problems_per_step, recipe.train.lr) == (4, 64, 1e-6)
    plain = method()
    assert (plain.form, plain.support, plain.k, plain.tail, plain.entry_weight) == (
        "divergence", "student_topk", 16, "bucket", None
    )  # fmt: skip
    published = method(form="advantage")
    assert published.loss == EntryAdvantage(plain.loss.support, "student_p") and published.tail == "drop"
    assert published.needs == Needs(views={"teacher": Asked("distribution")})
    assert method(form="advantage", support="teacher_topk").needs == Needs(views={"teacher": Asked("topk", 16)})
    sampled = method(form="advantage", support="sampled")
    assert sampled.loss == TeacherAdvantage("ratio") and sampled.needs == Needs(views={"teacher": Asked("sampled")})


@pytest.mark.parametrize("form", ["divergence", "advantage"])
@pytest.mark.parametrize("support", ["student_topk", "sampled", "full"])
def test_resolved_recipes_read_back(form: str, support: str) -> None:
    first = parse_recipe({**MINIMAL, "method": {"name": "topk_opd", "form": form, "support": support}})
    assert parse_recipe(tomllib.loads(toml.dumps(first.as_dict()))) == first


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"entry_weight": "none"}, 'form = "divergence" with support = "student_topk" has no use for entry_weight'),
        ({"form": "advantage", "support": "sampled", "entry_weight": "none"}, "has no use for entry_weight"),
        ({"form": "advantage", "divergence": "forward_kl"}, "is no divergence"),
        ({"form": "advantage", "tail": "bucket"}, "is no divergence"),
        ({"form": "advantage", "clip": "token"}, "is no divergence"),
        ({"form": "advantages"}, "should be 'divergence' or 'advantage'"),
        ({"support": "sampled", "divergence": "forward_kl"}, "estimates reverse_kl"),
        ({"support": "full", "k": 4}, "has no k"),
    ],
)
def test_refusals(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_recipe({**MINIMAL, "method": {"name": "topk_opd", **keys}})
