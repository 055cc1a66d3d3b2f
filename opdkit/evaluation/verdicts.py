"""What a verifier model said of answers that the rules reject: kept beside them, counted apart. No torch.

The numbers of the rules are never touched: an accepted answer is right only in the numbers that say "with verifier".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from opdkit.data.files.names import slug
from opdkit.errors import UserError
from opdkit.measure.accuracy import Accuracy, by_problem
from opdkit.run.jsonl import append_lines, open_lines
from opdkit.run.stored_answers import StoredAnswer, measure, read_lines

MIN_MASS = 0.5  # a verifier that would rather say something else than its verdict has given none

# Tasks whose graders compare a final answer with a gold answer by rules; a program's tests are no rule to soften.
TASKS_WITH_RULES = ("math", "multiple_choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One answer, asked twice with the two verdict words exchanged."""

    problem_id: str
    sample_id: int
    text_digest: str
    margin: float  # nats: log p(same answer) - log p(another answer), mean over both orders
    mass: float  # the probability of the two verdict words together, the smaller of both orders

    @property
    def is_clear(self) -> bool:
        return self.mass >= MIN_MASS

    @property
    def is_accepted(self) -> bool:
        return self.is_clear and self.margin > 0


class VerifiedSet(TypedDict):
    """One data set in `verifier` of result.json."""

    num_asked: int  # answers that the rules reject
    num_accepted: int
    num_unclear: int  # no verdict: the verifier would rather have said something else
    eval: Accuracy  # with the accepted answers as right ones; `eval` beside it holds the rules' numbers


class VerdictStore:
    """A JSONL file of verdicts of one verifier; of another one it is refused."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._header = {"identity": json.loads(json.dumps(identity))}
        rows = open_lines(path)
        self._is_new = not rows
        if rows and rows[0] != self._header:
            raise UserError(f"{path} holds the verdicts of another verifier; delete that file, or choose another --out")
        self.verdicts = [Verdict(**row) for row in rows[1:]]

    def append(self, verdicts: Sequence[Verdict]) -> None:
        rows = [asdict(verdict) for verdict in verdicts]
        append_lines(self._path, [self._header, *rows] if self._is_new else rows)
        self._is_new = False
        self.verdicts += verdicts


def verdicts_path(folder: Path, name: str) -> Path:
    return folder / f"{slug(name)}.verifier.jsonl"


def read_verdicts(folder: Path, name: str) -> list[Verdict]:
    """Those that were kept; [] where none was asked."""
    path = verdicts_path(folder, name)
    if not path.exists():
        return []
    try:
        return [Verdict(**row) for row in read_lines(path)[1:]]
    except TypeError as error:
        raise UserError(f"{path} holds a line that is no verdict ({error}); delete the file and verify again") from None


def rejected(answers: Sequence[StoredAnswer]) -> list[StoredAnswer]:
    """Answers that the rules call wrong and that say something. Ungraded ones are not theirs to judge."""
    return [answer for answer in answers if answer.reward == 0.0 and answer.text.strip()]


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def with_verdicts(
    answers: Sequence[StoredAnswer], verdicts: Sequence[Verdict], *, task: str, has_finals: bool = True
) -> VerifiedSet:
    """The numbers with accepted answers as right ones. A verdict counts for the very text it was given on, and only
    while the rules still reject it; an accepted answer votes with the right ones of its problem. has_finals: as in
    `accuracy`."""
    has_finals = has_finals or any(answer.parsed is not None for answer in answers)
    asked = {(answer.problem_id, answer.sample_id): answer for answer in rejected(answers)}
    said = {
        (v.problem_id, v.sample_id): v
        for v in verdicts
        if (answer := asked.get((v.problem_id, v.sample_id))) is not None and digest(answer.text) == v.text_digest
    }
    right = {
        problem_id: next((a.parsed for a in group if a.reward == 1.0), None)
        for problem_id, group in by_problem(answers).items()
    }
    accepted = {key for key, verdict in said.items() if verdict.is_accepted}
    softened = [
        replace(a, reward=1.0, parsed=(right[a.problem_id] or "accepted by the verifier") if has_finals else None)
        if (a.problem_id, a.sample_id) in accepted
        else a
        for a in answers
    ]
    return VerifiedSet(
        num_asked=len(said),
        num_accepted=len(accepted),
        num_unclear=sum(not verdict.is_clear for verdict in said.values()),
        eval=measure(softened, task=task, has_finals=has_finals)[0],
    )
