"""Teacher scores: the mean log-prob of an answer's tokens, nats, behind each context. Resumable, in fixed batches.

What is read twice (two conditions with one context, two equal answers) is scored once, so equal answers have equal
scores to the last bit. A batch is always scored whole: what it says does not depend on where a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opdkit.engines.base import Scorer
from opdkit.errors import UserError
from opdkit.measure.ranking import Definitions
from opdkit.measure.signal import ScoredAnswer, difficulty
from opdkit.run.jsonl import append_lines, open_lines
from opdkit.types import Asked, Group, Message, Rollout

PAIRS_PER_BATCH = 256  # what a crash can cost
Row = dict[str, Any]


@dataclass(slots=True)
class Pair:
    """A context and an answer, and the lines of scores.jsonl that their score fills."""

    context_ids: npt.NDArray[np.int32]  # not a tuple: hundreds of megabytes of them are held at once
    rollout: Rollout
    lines: list[Row]

    @property
    def length(self) -> int:
        return len(self.context_ids) + len(self.rollout.answer_ids)


def pairs_of(
    contexts: Sequence[Row],
    groups: Sequence[Group],
    texts: Mapping[tuple[str, int], str],
    render: Callable[[Sequence[Message]], Sequence[int]],
    is_success: Callable[[Rollout], bool | None],
) -> list[Pair]:
    """Longest first, so that what does not fit into memory shows at once, and neighbours are of a length.

    texts: of the answers; one that is that of a shown answer, white space around it apart, is a copy.
    """
    rollouts = {rollout.key: rollout for group in groups for rollout in group.rollouts}
    verdicts = {group.problem.id: [bool(is_success(rollout)) for rollout in group.rollouts] for group in groups}
    found: dict[tuple[bytes, bytes, bytes], Pair] = {}
    for context in contexts:
        ids = np.array(render(context["messages"]), dtype=np.int32)
        shown = {texts[problem_id, sample_id].strip() for problem_id, sample_id in context["sources"]}
        for sample_id in context["sample_ids"]:
            rollout = rollouts[context["problem_id"], sample_id]
            answer = np.array(rollout.answer_ids, dtype=np.int32).tobytes()
            key = (ids.tobytes(), answer, rollout.answer_mask.tobytes())
            found.setdefault(key, Pair(ids, rollout, [])).lines.append(
                {
                    "condition": context["condition"],
                    "problem_id": rollout.problem_id,
                    "sample_id": sample_id,
                    "score": None,
                    "sum_logprob": None,
                    "num_tokens": None,
                    "reward": rollout.reward,
                    "success": bool(is_success(rollout)),
                    "num_successes": sum(verdicts[rollout.problem_id]),
                    "num_answers": len(verdicts[rollout.problem_id]),
                    "effective": context["effective"],
                    "num_context_tokens": len(ids),
                    "num_truncated_tokens": context["num_truncated_tokens"],
                    "copy": texts[rollout.key].strip() in shown,
                }
            )
    return [found[key] for key in sorted(found, key=lambda key: (-found[key].length, *key))]


def score(
    path: Path,
    header: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    scorer: Scorer,
    max_positions: int | None,
    progress: Callable[[int], None],
) -> None:
    """Append to `path` what is missing there. `progress` hears of pairs.

    Lines of pairs that are longer than the teacher's positions are written without a score: counted, never a number.
    Raises UserError if that is all of them.
    """
    done = {_key(row) for row in open_lines(path)[1:]}
    if not path.exists():
        append_lines(path, [header])
    fitting = [pair for pair in pairs if max_positions is None or pair.length <= max_positions]
    if not fitting:
        raise UserError(
            f"every answer with its context is longer than the {max_positions} positions of the teacher (the shortest "
            f"has {pairs[-1].length}); show less with --context max_tokens_per_peer=..., or choose another teacher"
        )
    too_long = pairs[: len(pairs) - len(fitting)]  # the longest come first
    append_lines(path, [line for pair in too_long for line in pair.lines if _key(line) not in done])
    for start in range(0, len(fitting), PAIRS_PER_BATCH):
        batch = fitting[start : start + PAIRS_PER_BATCH]
        missing = [[line for line in pair.lines if _key(line) not in done] for pair in batch]
        if any(missing):
            said = _scores(scorer, batch)
            append_lines(path, [{**line, **own} for lines, own in zip(missing, said, strict=True) for line in lines])
        progress(len(too_long) + start + len(batch))


def scored_answers(rows: Sequence[Row], definitions: Definitions) -> list[ScoredAnswer]:
    """The lines of scores.jsonl as `measure.signal` reads them; lines without a score are left out.

    Those of opdkit 0.1 do not say which answers are copies: not known.
    """
    return [
        ScoredAnswer(
            condition=row["condition"],
            problem_id=row["problem_id"],
            sample_id=row["sample_id"],
            score=row["score"],
            reward=row["reward"],
            success=row["success"],
            bucket=difficulty(row["num_successes"], row["num_answers"], definitions),
            effective=row["effective"],
            num_context_tokens=row["num_context_tokens"],
            num_truncated_tokens=row["num_truncated_tokens"],
            copy=row.get("copy"),
        )
        for row in rows
        if row["score"] is not None
    ]


def _key(row: Row) -> tuple[str, str, int]:
    return row["condition"], row["problem_id"], row["sample_id"]


def _scores(scorer: Scorer, batch: Sequence[Pair]) -> list[Row]:
    """Means over the tokens the model wrote: a tool's words are not the answer's."""
    signals = scorer.score(
        [pair.context_ids.tolist() for pair in batch],
        [pair.rollout.answer_ids for pair in batch],
        Asked("sampled"),
    )
    said = []
    for pair, signal in zip(batch, signals, strict=True):
        written_T = np.asarray(signal.sampled_logprob_T, dtype=np.float64)[pair.rollout.answer_mask]
        said.append(
            {"score": float(written_T.mean()), "sum_logprob": float(written_T.sum()), "num_tokens": len(written_T)}
        )
    return said
