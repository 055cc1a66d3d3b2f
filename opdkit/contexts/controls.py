"""Controls for the peer context: as many demonstrations, or as many tokens of them, but other ones.

A control answers "was it the verified peer, or just more text?" for each rollout: it takes the blocks the rollout would
have been shown (the baseline) and fills as many, or as long ones, differently. Where that cannot be done the rollout is
shown nothing and leaves the teacher's terms of the loss, so that what remains is matched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from opdkit.types import Rollout

PeerKind = Literal["success", "another", "failure"]
Length = Callable[[PeerKind, Rollout], int]  # tokens of a demonstration, as it would be shown


@dataclass(frozen=True, slots=True)
class Pick:
    """A peer, and what it is shown as. A hidden one keeps its place, so that no other slot shows it."""

    kind: PeerKind
    peer: Rollout
    hidden: bool = False


class Control(BaseModel):
    """[context.control]

    random_peer       the same slots and sentences, filled with siblings whatever their verdict; no slot gets the peer
                      it has in the baseline
    unrelated_prompt  successes, of other problems of the step
    success_only      successes in place of failures; topped up with those of other problems
    match             block: as many demonstrations. token: random_peer takes the peer closest in length for each slot;
                      the other two go on until the baseline's number of tokens is reached
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["random_peer", "unrelated_prompt", "success_only"]  # what is shown instead, see above
    match: Literal["block", "token"] = "block"  # as many demonstrations, or as many tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Who a control may show to one rollout, each list in the order to take them from."""

    siblings: Sequence[Rollout]  # graded, without the rollout itself
    successes: Sequence[Rollout]  # of the same problem
    strangers: Sequence[Rollout]  # successes of other problems


def control_picks(
    control: Control, baseline: Sequence[Pick], pool: Pool, length: Length, *, may_repeat: bool
) -> list[Pick] | None:
    """What is shown in place of `baseline` (which shows something); None if nothing matches it.

    may_repeat: the published random_peer, which may show the baseline's own peers again. Matched by token it then
    always does, since nothing is closer in length to a peer than that peer.
    """
    by_length = length if control.match == "token" else None
    if control.kind == "random_peer":
        return _other_siblings(baseline, pool.siblings, by_length, may_repeat=may_repeat)
    own = pool.successes if control.kind == "success_only" else ()
    return _successes(baseline, [*own, *pool.strangers], by_length)


def _other_siblings(
    baseline: Sequence[Pick], siblings: Sequence[Rollout], length: Length | None, *, may_repeat: bool
) -> list[Pick] | None:
    """One sibling for each slot, the first that is free; goes back when the last slot is left with its own peer."""
    if not baseline:
        return []
    slot, *later = baseline
    ranked = list(siblings)
    if length is not None:
        wanted = length(slot.kind, slot.peer)
        ranked.sort(key=lambda peer: abs(length(slot.kind, peer) - wanted))
    for peer in ranked:
        if may_repeat or peer is not slot.peer:
            rest = _other_siblings(later, [s for s in siblings if s is not peer], length, may_repeat=may_repeat)
            if rest is not None:
                return [Pick(slot.kind, peer), *rest]
    return None


def _successes(baseline: Sequence[Pick], candidates: Sequence[Rollout], length: Length | None) -> list[Pick] | None:
    wanted = len(baseline) if length is None else sum(length(pick.kind, pick.peer) for pick in baseline)
    picks: list[Pick] = []
    reached = 0
    for peer in candidates:
        if reached >= wanted:
            break
        picks.append(Pick("another" if picks else "success", peer))
        reached += 1 if length is None else length("success", peer)
    return picks if reached >= wanted else None
