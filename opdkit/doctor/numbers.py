"""Numbers that must come out: a head in low precision against fp64, and a loss of 0 where both sides are one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opdkit import losses
from opdkit.doctor.findings import Finding, failed, not_checked, passed
from opdkit.doctor.patient import Patient
from opdkit.engines.hf import HFEngine
from opdkit.losses import Head, head_stats
from opdkit.methods.weighting import Weights
from opdkit.training.backward import Learned, hidden_of, parts_of_terms
from opdkit.training.batch import Batch
from opdkit.training.plan import plan
from opdkit.types import Example, Group, View

MOST_TOKENS, ROWS_AT_ONCE = 128, 8192  # of the head's proof; rows of the vocabulary in fp64 at one time
HEAD_MEAN, HEAD_MOST = 1e-3, 1e-2  # nats; logits rounded to bf16 are off by 0.025 and 0.1
ONE_SIDED = "renormalise_teacher"  # which is above 0 where both agree, and is meant to be (EOPD)
SAME = {"float32": 1e-4, "bfloat16": 0.06}  # nats a token, between two passes over one row


def head_precision(patient: Patient) -> Finding:
    """Log-probs of real tokens through the head as the loss reads it, against fp64 from the same hidden states."""
    states_NH, head = torch.cat(patient.states)[:MOST_TOKENS], patient.head
    ids_N = torch.tensor([token for answer in patient.answer_ids for token in answer][:MOST_TOKENS])
    states_NH, ids_N = states_NH.to(head.weight_VH.device), ids_N.to(head.weight_VH.device)
    ours_N = head_stats(states_NH, head, sampled_ids_N=ids_N).sampled_logprob_N
    assert ours_N is not None
    off_N = (ours_N.double() - exact_logprob(states_NH, head, ids_N)).abs()
    mean, most = float(off_N.mean()), float(off_N.max())
    said = f"{len(off_N)} tokens in {states_NH.dtype}: off by {mean:.1e} nats in the mean, {most:.1e} at most".replace(
        "torch.", ""
    )
    if not (mean <= HEAD_MEAN and most <= HEAD_MOST):
        return failed(
            f"{said}, where {HEAD_MEAN:g} and {HEAD_MOST:g} are allowed",
            'logits are rounded on their way: this is a fault of opdkit or of the device; model.dtype = "float32" '
            "shows which",
        )
    return passed(said)


@torch.no_grad()
def exact_logprob(states_NH: Tensor, head: Head, ids_N: Tensor) -> Tensor:
    """[N] fp64 log-probs of these ids, a part of the vocabulary after another."""
    states_NH = states_NH.double()
    total_N = torch.full((len(states_NH),), -torch.inf, dtype=torch.float64, device=states_NH.device)
    own_N = torch.zeros_like(total_N)
    for start in range(0, head.num_tokens, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, head.num_tokens))
        output_NV = states_NH @ head.weight_VH[rows].double().T
        if head.bias_V is not None:
            output_NV += head.bias_V[rows].double()
        output_NV *= head.logit_scale
        if head.softcap is not None:
            output_NV = torch.tanh(output_NV / head.softcap) * head.softcap
        if head.absent_ids is not None:
            absent = head.absent_ids[(head.absent_ids >= rows.start) & (head.absent_ids < rows.stop)]
            output_NV[:, absent - rows.start] = -torch.inf
        here_N = (ids_N >= rows.start) & (ids_N < rows.stop)
        own_N[here_N] = output_NV[here_N, ids_N[here_N] - rows.start]
        total_N = torch.logaddexp(total_N, output_NV.logsumexp(-1))
    return own_N - total_N


def nothing_to_learn(patient: Patient) -> Finding:
    """With the student in the place of every view, on its own prompt, and equal rewards, the method's terms are 0."""
    state = replace(patient.state, weights=Weights(), spool=None)
    if not state.needs.views:
        return not_checked(f"{state.method.name} asks no view")
    rows = as_own_teacher(patient, patient.few_rows)
    batch = Batch(rows, state.student.device)
    terms, _, _ = plan(state, batch, _groups(rows))
    terms = [term for term in terms if term.asks and getattr(term.loss, "tail", None) != ONE_SIDED]
    if not terms:
        return not_checked(f"no term of {state.method.name} asks a view of these answers")
    weights, learned, squares = patient.weights, Learned(), 0.0
    for part, of_part in parts_of_terms(state, batch, terms):
        with torch.no_grad():
            hidden_nH = hidden_of(state, part, weights)
        hidden_nH.requires_grad_()
        views = batch.view_tokens(part, sorted({view for term in of_part for view in term.asks}))
        ids_n, at = batch.ids_N[part.tokens_n], state.method.loss_temperature
        out = losses.head_loss(hidden_nH, _frozen(patient.head), ids_n, of_part, views, temperature=at)
        out.loss.backward()
        assert hidden_nH.grad is not None
        squares += float(hidden_nH.grad.double().square().sum())
        learned.add(out, part.tokens_n, batch.num_tokens)
    limit = SAME[patient.recipe.model.dtype]
    counted = [term.name for term in terms if term.name in learned.tokens]
    if not counted:
        return not_checked(f"{state.method.name} asks no view of these answers")
    sizes = {name: float(learned.tokens[name].abs().nanmean()) for name in counted}
    said = ", ".join(f"{name} {size:.1e}" for name, size in sizes.items())
    if not all(size <= limit for size in sizes.values()):
        return failed(
            f"the student as its own teacher has a loss: {said} nats a token, where {limit:g} is rounding",
            "one side is scaled, cut, read or masked in another way than the other: this is a fault of opdkit, or of "
            "a method of your own",
        )
    return passed(f"the student as its own teacher: {said} nats a token, gradient {squares**0.5:.1e}")


def _frozen(head: Head) -> Head:
    """Of which no gradient is asked."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return replace(head, weight_VH=head.weight_VH.detach(), bias_V=bias_V)


def as_own_teacher(patient: Patient, rows: list[Example]) -> list[Example]:
    """The rows as if every view were the student that reads its own prompt, and every reward the same."""
    state, engine = patient.state, HFEngine(patient.state.student, weights=patient.weights)
    prompts, answers = [row.rollout.prompt_ids for row in rows], [row.rollout.answer_ids for row in rows]
    said = {
        name: engine.score(prompts, answers, asked, temperature=state.method.loss_temperature)
        for name, asked in state.asked.items()
    }
    return [
        replace(
            row,
            rollout=replace(row.rollout, reward=None if row.rollout.reward is None else 1.0),
            views=dict.fromkeys(said, View(context_ids=row.rollout.prompt_ids)),
            signals={name: signals[number] for name, signals in said.items()},
        )
        for number, row in enumerate(rows)
    ]


def _groups(rows: list[Example]) -> list[Group]:
    of_problem: dict[str, list[Example]] = {}
    for row in rows:
        of_problem.setdefault(row.problem.id, []).append(row)
    return [Group(problem=own[0].problem, rollouts=tuple(r.rollout for r in own)) for own in of_problem.values()]
