"""Every coefficient of a batch, before its first backward. Letters: N counted tokens of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from opdkit import losses
from opdkit.losses.spec import LossSpec, NegativeLogLikelihood, TeacherAdvantage
from opdkit.methods.base import PlanInputs, Report
from opdkit.train.backward import Learned, parts_of_terms, read
from opdkit.train.batch import Batch
from opdkit.train.state import State
from opdkit.types import Group


def plan(state: State, batch: Batch, groups: Sequence[Group]) -> tuple[list[losses.Term], Report, PlanInputs]:
    """The terms of the loss; what the method says of the batch; what both were made of."""
    inputs = batch.plan_inputs(
        step=state.step,
        progress=state.step / state.num_steps,
        seed=state.seed,
        num_ids=state.student.num_tokens,
        needs=state.needs,
        required_views=state.method.required_views,
        pass_rates=state.weights.pass_rates(groups, state.pass_rates),
    )
    if not inputs.mask_N.any():  # nobody had anything to read: the metrics say so, and the step changes nothing
        return [], Report(), inputs
    inputs = state.weights.apply(ask_student(state, batch, inputs))
    return state.method.terms(inputs), state.method.report(inputs), inputs


@torch.no_grad()
def ask_student(state: State, batch: Batch, inputs: PlanInputs) -> PlanInputs:
    """What the student says before the update, from a pass without gradient; only made where coefficients depend on it.

    NaN for tokens that no term can count; for scores that ask the teacher also where it says nothing.
    """
    asked = asked_before_the_update(state)
    if not asked:
        return inputs
    weights, weight_N = state.optimizer.compute_weights(), inputs.weight_N
    terms = []
    for name, loss in asked.items():
        known_N = inputs.mask_N & inputs.said_by("teacher") if loss.needs.teacher != "none" else inputs.mask_N
        terms.append(losses.Term(name=name, loss=loss, coef_N=known_N.to(weight_N.dtype)))
    seen = Learned()
    for part, of_part in parts_of_terms(state, batch, terms):
        seen.add(read(state, batch, part, of_part, weights), part.tokens_n, batch.num_tokens)
    unknown_N = batch.new_per_token()
    teacher_logprob_N = inputs.teacher_logprob_N
    return replace(
        inputs,
        student_logprob_N=seen.tokens.get("logprob", unknown_N),
        student_entropy_N=seen.tokens.get("entropy", unknown_N),
        student_scores={name: seen.tokens.get(name, unknown_N) for name in asked},
        teacher_logprob_N=seen.tokens.get("teacher_logprob") if teacher_logprob_N is None else teacher_logprob_N,
    )


def asked_before_the_update(state: State) -> dict[str, LossSpec]:
    """What must be scored for every token before coefficients are made, by name."""
    asked, asking = state.weights.scores, [state.method.needs, *(part.needs for part in state.weights.parts)]
    if state.needs.teacher == "distribution" and any(needs.teacher in ("sampled", "topk") for needs in asking):
        asked["teacher"] = TeacherAdvantage()  # whoever asked for log-probs gets them, read from hidden states
    if state.needs.student:
        asked["student"] = NegativeLogLikelihood()
    return asked
