"""Every coefficient of a batch, before its first backward. Letters: N counted tokens of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opdkit import losses
from opdkit.losses.spec import LossSpec, NegativeLogLikelihood, Target, TeacherAdvantage
from opdkit.methods.base import Report
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.training.backward import Learned, parts_of_terms, read
from opdkit.training.batch import Batch
from opdkit.training.spans import BY_STUDENT, spread_spans
from opdkit.training.state import State
from opdkit.types import Group


def plan(state: State, batch: Batch, groups: Sequence[Group]) -> tuple[list[losses.Term], Report, PlanInputs]:
    """The terms of the loss; what the method says of the batch; what both were made of."""
    route = state.route if state.route and state.route.denominator == "domain" else None
    inputs = inputs_of(
        state,
        batch,
        pass_rates=state.weights.pass_rates(groups, state.pass_rates),
        domain_of=route.number_of if route else None,
        num_domains=len(route.views) if route else 1,
    )
    if not inputs.mask_N.any():  # no view had anything to read: the metrics say so, and the step changes nothing
        return [], Report(), inputs
    inputs = state.weights.apply(spread_spans(batch, ask_student(state, batch, inputs)))
    return state.method.terms(inputs), state.method.report(inputs), inputs


def inputs_of(state: State, batch: Batch, **more: Any) -> PlanInputs:
    """What coefficients are made of, at this step of the run. more: further arguments of `Batch.plan_inputs`."""
    return batch.plan_inputs(
        step=state.step,
        progress=state.step / state.num_steps,
        seed=state.seed,
        num_ids=state.student.num_tokens,
        asked=state.asked,
        required_views=state.method.required_views,
        **more,
    )


@torch.no_grad()
def ask_student(state: State, batch: Batch, inputs: PlanInputs) -> PlanInputs:
    """What the student says before the update, from a pass without gradient; only made where coefficients depend on it.

    NaN for tokens that no term can count; for what asks a view also where that says nothing. The same pass reads the
    log-probs of views that gave hidden states, for whoever asked for log-probs.
    """
    asked = asked_before_the_update(state)
    if not asked:
        return inputs
    weights, weight_N = state.optimizer.compute_weights(), inputs.weight_N
    terms = []
    for name, (loss, target) in asked.items():
        known_N = inputs.mask_N & inputs.said_by(*target.asks(loss))
        terms.append(losses.Term(name=name, loss=loss, coef_N=known_N.to(weight_N.dtype), target=target))
    seen = Learned()
    state.optimizer.make_ready()
    for part, of_part in state.student.in_step([*parts_of_terms(state, batch, terms)], lambda: weights):
        seen.add(read(state, batch, part, of_part, weights), part.tokens_n, batch.num_tokens)
    seen = seen.of_all_ranks(state.ranks, batch)
    unknown_N = batch.new_per_token()
    from_states = {v: seen.tokens.get(f"{v}_logprob", unknown_N) for v in state.asked if v not in inputs.view_logprob}
    return replace(
        inputs,
        student_logprob_N=seen.tokens.get("logprob", unknown_N),
        student_entropy_N=seen.tokens.get("entropy", unknown_N),
        student_scores={name: seen.tokens.get(name, unknown_N) for name in asked},
        view_logprob={**inputs.view_logprob, **from_states},
    )


def asked_before_the_update(state: State) -> dict[str, tuple[LossSpec, Target]]:
    """What must be scored for every token before coefficients are made, by name, and against what."""
    asked = {name: (loss, Target()) for name, loss in state.weights.scores.items()}
    asking = [state.method.needs, *(part.needs for part in state.weights.parts)]
    for view, whole in state.needs.views.items():
        said = [needs.views[view] for needs in asking if view in needs.views]
        if whole.answer == "distribution" and any(ask.logprob or ask.answer != "distribution" for ask in said):
            # Whoever asked for log-probs gets them, read from hidden states.
            for reading in state.readings(view):
                asked[f"{reading}/logprob"] = (TeacherAdvantage(), Target.of({reading: 1.0}))  # no name of a score
    if state.needs.student or any(teacher.spread in BY_STUDENT for teacher in state.teachers):
        asked["student"] = (NegativeLogLikelihood(), Target())
    return asked
