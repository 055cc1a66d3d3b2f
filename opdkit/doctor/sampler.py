"""Is the policy that samples the one that is trained? Of the recipe's own engine, in this process or at a server."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from opdkit.doctor.findings import Finding, failed, not_checked, passed
from opdkit.doctor.patient import PROBE_TEMPERATURE, Patient
from opdkit.doctor.trainer import Floats, says
from opdkit.metrics import reduce_metrics
from opdkit.run.sentinels import GAP_LIMITS, wide_gap
from opdkit.training.batch import Batch
from opdkit.training.metrics.sampler_gap import sampler_gap

UNLIKELY = 6.0  # standard errors of a mean: once in a billion, were the draws right
LEAST_TOKENS, LEAST_ENTROPY = 24, 0.05  # of draws that can be judged; nats in the mean
_ENGINE = 'sampling.engine = "hf" is the reference; of a server look at its version and its options'


def echo(patient: Patient) -> Finding:
    """Greedy answers are the trainer's likeliest ids: what is sampled, kept and learned are the same ids."""
    greedy, student = patient.greedy, patient.state.student
    for answer in greedy.sampled:
        ids = answer.answer_ids
        stops = [place for place, token in enumerate(ids) if token in student.stop_ids]
        if not ids or len(ids) > greedy.params.max_answer_tokens or len(answer.logprobs_T) != len(ids):
            return failed(f"the engine gave {len(ids)} ids with {len(answer.logprobs_T)} log-probs", _ENGINE)
        if stops != ([len(ids) - 1] if answer.finish == "stop" else []):
            return failed(
                f'an answer of {len(ids)} ids that ended by "{answer.finish}" has stop tokens at {stops}', _ENGINE
            )
    found = patient.says_of(greedy, 1.0)
    short_N = found.best_N - found.logprob_N
    wrong = int((~(short_N <= GAP_LIMITS[patient.recipe.model.dtype][1])).sum())
    if wrong:
        return failed(
            f"{wrong} of {len(short_N)} greedy tokens of the engine are not the trainer's likeliest ones, by up to "
            f"{short_N.max():.2g} nats: it reads another prompt, or gives other ids than it drew",
            _ENGINE,
        )
    return passed(f"{len(short_N)} greedy tokens are the trainer's likeliest, id by id{_drift(patient)}")


def _drift(patient: Patient) -> str:
    """How many answers would become other ids if their text were encoded again, which opdkit never does."""
    tokenizer = patient.run.parts.renderer.tokenizer
    answers, other = patient.drawn.answers, 0
    for answer in answers:
        try:
            again = tuple(tokenizer(tokenizer.decode(answer), add_special_tokens=False)["input_ids"])
        except Exception:  # tokenizers raises plain Exception for a text that it cannot read
            again = ()
        other += again != tuple(answer)
    return f"; as text, {other} of {len(answers)} answers would come back as other ids" if other else ""


def off_by_one(patient: Patient) -> Finding:
    """A log-prob of the engine belongs to its own token, not to a neighbour."""
    found = {shift: _gap(patient, PROBE_TEMPERATURE, shift) for shift in (-1, 0, 1)}
    if not np.isfinite(found[0]):
        return failed("the engine gives log-probs that are no numbers", _ENGINE)
    nearest = min(found, key=lambda shift: found[shift])
    if nearest != 0 and found[0] > GAP_LIMITS[patient.recipe.model.dtype][0]:
        whose = "next" if nearest == 1 else "previous"
        return failed(
            f"the engine's log-probs are off by {found[0]:.2g} nats in the mean, and by {found[nearest]:.2g} as those "
            f"of the {whose} token",
            _ENGINE,
        )
    return passed(f"off by {found[0]:.1e} nats; as those of a neighbour by {min(found[-1], found[1]):.2g}")


def temperature(patient: Patient) -> Finding:
    """The engine hears the temperature: it draws at it, and what it says of its draws is at it."""
    own, plain = _gap(patient, PROBE_TEMPERATURE), _gap(patient, 1.0)
    if not own <= GAP_LIMITS[patient.recipe.model.dtype][1]:
        at = f", and by {plain:.2g} from those of temperature 1" if plain < own else ""
        return failed(
            f"the engine's log-probs are off by {own:.2g} nats in the mean from those of temperature "
            f"{PROBE_TEMPERATURE}, which it was asked for{at}",
            "start the server with --logprobs-mode processed_logprobs and --generation-config vllm",
        )
    found = patient.says_of(patient.drawn, PROBE_TEMPERATURE)
    surplus_N = found.logprob_N + found.entropy_N  # 0 in the mean, of draws from this distribution
    num, entropy = len(surplus_N), float(found.entropy_N.mean())
    if num < LEAST_TOKENS or entropy < LEAST_ENTROPY:
        return not_checked(f"{num} tokens of {entropy:.2f} nats are too few to judge draws by", "--problems 16")
    errors = float(surplus_N.mean() / max(surplus_N.std() / np.sqrt(num), 1e-9))
    if abs(errors) > UNLIKELY:
        return failed(
            f"the engine was asked for temperature {PROBE_TEMPERATURE} and draws tokens that are "
            f"{'likelier' if errors > 0 else 'rarer'} than that ({surplus_N.mean():+.2g} nats, {abs(errors):.0f} "
            f"standard errors of {num} tokens)",
            "it does not hear the temperature, or cuts what it draws from (top-k, top-p, penalties): see its options",
        )
    return passed(f"{num} tokens drawn at {PROBE_TEMPERATURE} are as likely as they should be: {errors:+.1f} standard "
                  f"errors")  # fmt: skip


def sampler_and_trainer(patient: Patient) -> Finding:
    """The sampler's log-probs of the step's own answers are the trainer's, as the step's metrics compare them."""
    state, rows, sampling = patient.state, patient.rows, patient.recipe.sampling
    if state.method.answer_source != "student" or state.replays:
        return not_checked("the answers of this recipe are not the student's")
    if sampling.temperature == 0:
        return not_checked("sampling.temperature = 0: a greedy sampler has no log-probs to compare")
    found = says(patient.states, patient.head, patient.answer_ids, temperature=sampling.temperature)
    counted_N = np.concatenate([row.rollout.answer_mask for row in rows])
    logprob_N = torch.from_numpy(found.logprob_N[counted_N]).to(state.student.device)
    at_one = replace(state, method=state.method.model_copy(update={"loss_temperature": sampling.temperature}))
    batch = Batch(rows, state.student.device)
    seen = reduce_metrics(sampler_gap(at_one, batch, logprob_N, first=True))
    if seen["rollout/sampler_gap_mean"] is None:
        return not_checked("the engine does not say what its log-probs were before top-k, top-p and min-p cut them")
    if said := wide_gap(seen, patient.recipe.model.dtype):
        return failed(said, _ENGINE)
    return passed(
        f"{batch.num_tokens} tokens: off by {seen['rollout/sampler_gap_mean']:.1e} nats in the mean, "
        f"{seen['rollout/sampler_gap_p999']:.1e} at the 99.9th percentile"
    )


def _gap(patient: Patient, at: float, shift: int = 0) -> float:
    """Mean absolute difference, in nats, of the engine's log-probs of the drawn answers to the trainer's at this
    temperature; the engine's of a place taken for the trainer's `shift` places on."""
    found = patient.says_of(patient.drawn, at)
    gaps, start = list[Floats](), 0
    for told in patient.drawn.sampled:
        ours_T = found.logprob_N[start : start + len(told.answer_ids)]
        theirs_T, start = told.logprobs_T.astype(np.float64), start + len(told.answer_ids)
        if shift:
            ours_T = ours_T[shift:] if shift > 0 else ours_T[:shift]
            theirs_T = theirs_T[:-shift] if shift > 0 else theirs_T[-shift:]
        gaps.append(np.abs(theirs_T - ours_T))
    return float(np.concatenate(gaps).mean())
