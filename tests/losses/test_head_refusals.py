"""What `head_loss` refuses, and that the sentence names what is missing or does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_world import NUM_IDS, World, make_world

from opdkit.errors import UserError
from opdkit.losses import Divergence, Support, TeacherAdvantage, ViewTokens

REVERSE = Divergence("reverse_kl")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"views": None}, "needs of view 'teacher' hidden_NH and head"),
        ({"views": ViewTokens(sampled_logprob_N=torch.zeros(6))}, "needs of view 'teacher' hidden_NH and head"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"chunk_size": 0}, "chunk_size = 0 must be at least 1"),
    ],
)
def test_refusals(world: World, change: dict[str, object], sentence: str) -> None:
    """What a divergence over the student's entries cannot do without is named."""
    with pytest.raises(ValueError, match=sentence):
        world.run(world.term(Divergence("reverse_kl", Support("student_topk", 3))), **change)


def test_refusals_of_arrays_that_do_not_fit(world: World) -> None:
    """Short lists, other tokenizers, wrong lengths, ids beyond the vocabulary, same names, half a teacher, fp16."""
    two = ViewTokens(topk_ids_NK=torch.zeros(6, 2, dtype=torch.long), topk_logprob_NK=torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"topk_ids_NK and topk_logprob_NK with K >= 3, or hidden_NH and head"):
        world.run(world.term(Divergence("forward_kl", Support("teacher_topk", 3))), views=two)
    with pytest.raises(ValueError, match="sampled_logprob_N or hidden_NH and head"):
        world.run(world.term(TeacherAdvantage()), views=two)
    other = replace(world.teacher, head=replace(world.teacher.head, num_tokens=NUM_IDS + 1))
    with pytest.raises(ValueError, match="num_tokens = 12, the student's 11"):
        world.run(world.term(REVERSE), views=other)
    with pytest.raises(ValueError, match="holds 6 tokens, but sampled_ids_N holds 5"):
        replace(world, ids_N=world.ids_N[:5]).run(world.term(REVERSE))
    with pytest.raises(ValueError, match="view 'teacher': hidden_NH holds 5"):
        world.run(world.term(REVERSE), views=world.teacher.take(slice(5)))
    with pytest.raises(ValueError, match="ids from 0 to 11; the vocabulary has 11"):
        replace(world, ids_N=torch.tensor([0, 1, 2, 3, 4, 11])).run(world.term(REVERSE))
    with pytest.raises(ValueError, match="names of terms must differ"):
        world.run(world.term(REVERSE), world.term(REVERSE))
    with pytest.raises(ValueError, match="no terms"):
        world.run()
    with pytest.raises(ValueError, match="belong together"):
        ViewTokens(hidden_NH=world.hidden_NH)
    with pytest.raises(ValueError, match="the head has 13 rows"):
        world.with_head(num_tokens=14)
    with pytest.raises(UserError, match="fp16"):
        half = make_world(dtype=torch.float16)
        half.run(half.term(REVERSE))
