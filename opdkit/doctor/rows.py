"""Which tokens of a row are learned, and who wrote them: an audit of the rows that the trainer gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from opdkit.doctor.findings import Finding, failed, not_checked, passed, warned
from opdkit.doctor.patient import Patient
from opdkit.training.batch import Batch
from opdkit.types import AUTHORS, Example, Rollout

STUDENT, TOOL = AUTHORS.index("student"), AUTHORS.index("tool")


def masks_and_turns(patient: Patient) -> Finding:
    """What the model wrote is counted, what others wrote is not; turns count up; a turn ends once, at its end."""
    rows, student = patient.rows, patient.state.student
    found = Counter[str]()
    first: dict[str, str] = {}
    for row in rows:
        for fault in faults_of(row.rollout, student.stop_ids, student.num_tokens):
            found[fault] += 1
            first.setdefault(fault, str(row.rollout.key))
    found.update(batch_faults(rows, Batch(rows, student.device)))
    if found:
        lines = [f"{num} rows: {fault} (first: {first.get(fault, 'the batch')})" for fault, num in found.items()]
        return failed(f"{sum(found.values())} faults in {len(rows)} rows: {next(iter(found))}",
                      "this is a fault of opdkit or of the environment that made the rows: please report it",
                      lines)  # fmt: skip
    counted = sum(int(row.rollout.answer_mask.sum()) for row in rows)
    total = sum(len(row.rollout.answer_ids) for row in rows)
    turns = max((int(row.rollout.turn_numbers.max(initial=0)) + 1 for row in rows), default=0)
    by = Counter(AUTHORS[author] for row in rows for author in row.rollout.authors)
    written = ", ".join(f"{num} by the {author}" for author, num in by.items())
    return passed(f"{counted} of {total} tokens are counted ({written}), in up to {turns} turns")


def faults_of(rollout: Rollout, stop_ids: Collection[int], num_tokens: int) -> Iterator[str]:
    """What is wrong with a row, in words: an answer, or the turns of an episode with what was said between them."""
    ids, mask_T, authors_T = rollout.answer_ids, rollout.answer_mask, rollout.authors
    if not ids:
        if rollout.ended == "answer":  # else an episode without a turn: it failed, or there was no room for one
            yield "the answer is empty"
        return
    turns_T, own_T = rollout.turn_numbers.astype(np.int64), authors_T != TOOL
    own = np.flatnonzero(own_T)
    if not all(0 <= token < num_tokens for token in ids):
        yield "an id that no token has"
    if not mask_T.any():
        yield "no token is counted"
    if (mask_T & ~own_T).any():
        yield "a token that a tool or the environment wrote is counted"
    if ((authors_T == STUDENT) & ~mask_T).any():
        yield "a token that the student wrote is not counted"
    if (authors_T >= len(AUTHORS)).any():
        yield "a token of an unknown author"
    begins = turns_T[0] == 0 or rollout.episode is not None  # the later rows of an episode begin later
    if not begins or not np.isin(np.diff(turns_T), (0, 1)).all():
        yield "turns that do not count up from 0"
    ends = bool(len(own)) and ids[own[-1]] in stop_ids
    if rollout.finish == "stop" and not (ends and mask_T[own[-1]]):
        yield "an answer that ended by itself, whose stop token is not learned"
    if rollout.finish == "length" and ends:
        yield "an answer that was cut, and ends with a stop token"
    last_of_turns = {int(own[turns_T[own] == turn][-1]) for turn in np.unique(turns_T[own])}
    if any(ids[place] in stop_ids for place in own if place not in last_of_turns):
        yield "a stop token inside a turn"
    logprobs_T = rollout.answer_logprobs
    if logprobs_T is not None:
        told_T = logprobs_T[mask_T & (authors_T == STUDENT)]
        if not np.isfinite(told_T).all() or (told_T > 1e-3).any():
            yield "log-probs of counted tokens that are none"


def batch_faults(rows: Sequence[Example], batch: Batch) -> Iterator[str]:
    """Whether the flat arrays of the trainer hold exactly the counted tokens of the rows."""
    wanted = [
        (number, int(place), row.rollout.answer_ids[place])
        for number, row in enumerate(rows)
        for place in np.flatnonzero(row.rollout.answer_mask)
    ]
    there = zip(batch.row_N.tolist(), batch.index_N.tolist(), batch.ids_N.tolist(), strict=True)
    if wanted != [*there]:
        yield "the batch does not hold the counted tokens of its rows"


def episodes(patient: Patient) -> Finding:
    """Episodes are scored as they were sampled, piece by piece: the proof that `train` makes before its first step."""
    if patient.recipe.episode is None:
        return not_checked("answers have one turn")
    assert patient.engine is not None
    run = patient.run
    fix = "see [episode]: its environment, `calls`, `history`, and what the chat template shows of earlier turns"
    if doubts := run.answers.prove_episodes(run.problems, 0):
        return warned(doubts[0], fix, doubts[1:])
    rollouts = [row.rollout for row in patient.rows]
    broken = sum(rollout.ended == "failure" for rollout in rollouts)
    if broken:
        return warned(f"{broken} of {len(rollouts)} rows are of episodes whose environment failed", fix)
    turns = sum(len(rollout.turns) for rollout in rollouts)
    return passed(f"{len(rollouts)} rows of {turns} turns; the sampler's log-probs of every turn are the student's")
