"""Which token ids mean the same to two tokenizers. A teacher scores the student's ids: only those are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdkit.contexts.render import Renderer
from opdkit.errors import UserError

LEAST_SHARE = 0.5  # of the student's ids: below it the two are no family, whatever they happen to share


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonIds:
    """The ids that both sides have for the same token: what is sampled, compared and learned."""

    num_common: int
    num_student: int
    num_teacher: int
    end: int  # one more than the largest common id
    absent: tuple[int, ...]  # ids below `end` that are not common
    examples: tuple[str, ...]  # tokens that only one side has, or each has elsewhere

    @property
    def sentence(self) -> str:
        return (
            f"student and teacher have {self.num_common} token ids in common, of {self.num_student} and "
            f"{self.num_teacher}: the others (e.g. {', '.join(map(repr, self.examples))}) are not sampled or scored"
        )


def num_tokens(tokenizer: Any) -> int:
    """One more than the largest id. len(tokenizer) is smaller where added tokens leave gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def common_ids(student: Renderer, teacher: Renderer, *, names: tuple[str, str]) -> CommonIds | None:
    """What two vocabularies agree on; None: on everything.

    A token that one side lacks is left out (a pad token that a fine-tuning tool added), and so is one that both added
    under different ids and neither uses (reserved tokens). Raises UserError where a token that matters has two ids, or
    little is left.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours == theirs:
        return None
    moved = sorted(
        (token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]), key=ours.__getitem__
    )
    unused = _unused(student, ours) & _unused(teacher, theirs)
    if matters := [token for token in moved if token not in unused]:
        examples = ", ".join(f"{token!r} ({ours[token]} / {theirs[token]})" for token in matters[:3])
        raise _refusal(names, f"{len(matters)} tokens have other ids, e.g. {examples} (student / teacher)")
    common = {index for token, index in ours.items() if theirs.get(token) == index}
    if len(common) < LEAST_SHARE * len(ours):
        raise _refusal(names, f"only {len(common)} of the student's {len(ours)} tokens are known to the teacher")
    end = 1 + max(common)
    differ = [*moved, *_only(ours, theirs), *_only(theirs, ours)]
    return CommonIds(
        num_common=len(common),
        num_student=len(ours),
        num_teacher=len(theirs),
        end=end,
        absent=tuple(sorted(set(range(end)) - common)),
        examples=tuple(differ[:3]),
    )


def _unused(side: Renderer, vocabulary: Mapping[str, int]) -> set[str]:
    """Tokens that were added by name and of which nothing in the model's own reading or ending speaks."""
    tokenizer, template = side.tokenizer, side.template or ""
    roles = {text for role, text in tokenizer.special_tokens_map.items() if role in ("bos_token", "eos_token")}
    added = tokenizer.added_tokens_encoder.keys() - roles
    return {token for token in added if token not in template and vocabulary[token] not in side.stop_ids}


def _only(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    return sorted(one.keys() - other.keys(), key=one.__getitem__)


def _refusal(names: tuple[str, str], why: str) -> UserError:
    student, teacher = names
    return UserError(
        f"teacher.path = {teacher}: its tokenizer is not the student's ({student}): {why}. A teacher scores the "
        "student's token ids, so both must mean the same by them; choose a teacher of the same family."
    )
