"""A view may have any name, also one that a loss has whose value [weights] asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from opdkit.losses.spec import Divergence
from opdkit.training.plan import asked_before_the_update
from opdkit.types import Asked, Needs


def test_a_view_takes_no_score_away() -> None:
    score = Divergence("reverse_kl")
    method = SimpleNamespace(needs=Needs(views={"reverse_kl": Asked("distribution", logprob=True)}, student=True))
    state: Any = SimpleNamespace(
        weights=SimpleNamespace(scores={"reverse_kl": score}, parts=[]),
        method=method,
        needs=method.needs,
        readings=lambda view: [view],
    )
    asked = asked_before_the_update(state)
    assert asked["reverse_kl"][0] == score and len(asked) == 3, "the score, the view's log-probs, and the student"
