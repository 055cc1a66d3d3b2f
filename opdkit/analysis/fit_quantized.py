"""How far a quantised teacher is from the whole one, on the student's own answers: part of `opdkit fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from opdkit.engines.hf import HFEngine
from opdkit.measure.overlap import summary
from opdkit.recipe import Recipe
from opdkit.training.metrics.agreement import Side, compare_rows, hidden_states, teacher_side
from opdkit.training.models.other_models import OtherModel
from opdkit.training.models.teacher import ModelTeacher
from opdkit.training.parts import Parts
from opdkit.types import Asked, Example

MOST_ROWS = 64
NAMES = ("forward_kl", "reverse_kl", "top1_agreement", "ratio")


def agreement_with_whole(
    recipe: Recipe, parts: Parts, rows: Sequence[Example], k: int, heard: Callable[[int, int], None]
) -> dict[str, float | None]:
    """Means over the tokens of some answers: KL of the two in nats (forward: from the whole teacher), the share of
    tokens with one likeliest token, the overlap of the k likeliest. Both read what the teacher reads, at
    `loss_temperature`. The whole model is loaded beside the other."""
    teacher = parts.teacher
    assert teacher is not None
    section = recipe.teacher.model_copy(update={"quantization": None, "placement": "resident"})
    other = OtherModel(recipe, section, parts.student)
    _, _, end = other.readable()
    head = teacher.head()
    absent = [] if head.absent_ids is None else head.absent_ids.tolist()
    other.limit_to(min(end, head.num_tokens), absent)
    whole = ModelTeacher(other, teacher.renderer, max_tokens_per_batch=recipe.sampling.max_tokens_per_batch)
    whole.load()
    engine = whole.engine()
    assert isinstance(engine, HFEngine)

    def states(some: Sequence[Example]) -> list[Tensor]:
        contexts = [row.view.context_ids for row in some if row.view is not None]
        return hidden_states(engine.score(contexts, [row.rollout.answer_ids for row in some], Asked("distribution")))

    table = compare_rows(
        rows[:MOST_ROWS],
        Side(hidden=states, head=whole.head()),
        teacher_side(teacher.score, head),
        k=k,
        temperature=recipe.method.loss_temperature,
        device=parts.student.device,
        progress=heard,
    )
    numbers = summary(table, NAMES)
    # compare_rows calls its first side the student: KL(student || teacher), its reverse_kl, is from the whole teacher.
    return {
        "num_answers": float(len(rows[:MOST_ROWS])),
        "forward_kl": numbers["reverse_kl"],
        "reverse_kl": numbers["forward_kl"],
        "top1_agreement": numbers["top1_agreement"],
        "overlap": numbers["ratio"],
    }
