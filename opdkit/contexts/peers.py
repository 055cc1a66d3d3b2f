"""The teacher reads siblings: other answers to the same problem, right ones to follow and wrong ones to avoid.

SDPO (arXiv:2601.20802) shows one success and the rollout's own feedback; MOPD (arXiv:2605.12652) shows two successes
and a failure. Who is shown to whom, what counts as "no solution", and every sentence are as in the published code, but:

- Peers are taken in an order drawn anew for every problem and step, seeded by identity, so a choice is the same on
  every rank, in any batch order and after a resume. The published order is that of a batch laid out by length: the
  first success is a short one, for every sibling. `order = "published"` takes the list as it comes, and the first
  failure where that code draws one.
- The order belongs to the problem, not to the rollout: siblings read the same peers, but for those who are shown
  themselves and skip their own answer. S slots give at most S + 1 different sets of demonstrations, and what is the
  rollout's own (feedback) stands last, so that their common beginning can be read once.
- Each demonstration has a budget of tokens and is cut at its end. The question, the closing sentence and the chat
  header stand whole; the published code cuts the end of the finished prompt, which is where these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from opdkit.contexts.base import Context, Reader, Reading
from opdkit.contexts.blocks import PLACES, WORDINGS, Block, BlockKind, Wording, summary_of, without_thinking
from opdkit.contexts.controls import Control, PeerKind, Pick, Pool, control_picks
from opdkit.contexts.transcript import transcript, whole_episodes
from opdkit.types import Group, Rollout, seed_from

Slot = Literal["success", "failure", "hidden_success"]
Identity = tuple[int | str, ...]
Tokens = Annotated[int, Field(gt=0)]


def _by_name(wording: Any) -> Any:
    if not isinstance(wording, str):
        return wording
    if wording not in WORDINGS:
        raise ValueError(f"does not exist (choices: {', '.join(WORDINGS)}, or a table of your own sentences)")
    return WORDINGS[wording]


class Summaries(BaseModel):
    """[context.summaries]: short versions of further siblings, besides the slots."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    count: Annotated[int, Field(gt=0)] = 1  # how many summaries are shown
    of: Literal["success", "failure", "all"] = "success"  # whose answers are summarised
    tag: Annotated[str, Field(pattern=r"^\w+$")] = (
        "summary"  # <tag>...</tag> in the answer; else the answer's beginning
    )
    max_tokens: Tokens = 256  # of each


class Peers(Context):
    kind: Literal["peers"] = "peers"
    # A hidden success is chosen and not shown, so that the next success slot shows another one.
    slots: Annotated[tuple[Slot, ...], Field(strict=False)] = ("success", "success", "failure")
    # No solution: there is no right answer for the first success slot, or (for feedback) it is hidden, as published.
    failures: Literal["always", "when_no_solution"] = "always"
    feedback: Literal["never", "when_no_solution", "always"] = "when_no_solution"  # the rollout's own
    summaries: Summaries | None = None  # short versions of further peers; default: none
    control: Control | None = None  # show other demonstrations in place of these, for comparison; default: none
    success_threshold: Annotated[float, Field(allow_inf_nan=False)] = 1.0  # a success has at least this reward
    exclude_own_success: bool = True  # an own failure is never shown
    remove_thinking: Literal["never", "successes", "always"] = "never"  # whose <think>...</think> is taken out
    max_tokens_per_peer: Tokens = 4096  # a longer answer is cut at its end, and counted
    max_feedback_tokens: Tokens = 1024  # longer feedback is cut at its end, and counted
    order: Literal["seeded", "published"] = "seeded"  # in which peers are taken: drawn by a seed, or as they come
    # The sentences: "published" or "published_dataclass", or a table of your own.
    wording: Annotated[Wording, BeforeValidator(_by_name)] = WORDINGS["published"]

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        for fault in _faults(self):
            raise ValueError(fault)
        return self

    @property
    def needs_siblings(self) -> bool:
        return bool(self.slots)  # feedback alone is a rollout's own

    @property
    def shows_successes(self) -> bool:
        return "success" in self.slots

    @property
    def needs_rewards(self) -> bool:
        return True  # to tell a success from a failure, and a grader's feedback from its excuse

    @property
    def kinds(self) -> list[PeerKind]:
        """What each slot is shown as."""
        first = next((place for place, slot in enumerate(self.slots) if slot != "failure"), None)
        return [
            "failure" if slot == "failure" else "success" if place == first else "another"
            for place, slot in enumerate(self.slots)
        ]

    def is_success(self, rollout: Rollout) -> bool | None:
        """None: not graded, hence neither a success nor a failure."""
        return None if rollout.reward is None else rollout.reward >= self.success_threshold

    def read_groups(
        self, groups: Sequence[Group], reader: Reader, identity: Identity, reading: int = 0
    ) -> list[Reading | None]:
        """See `Context.read_groups`. Two of the controls show answers to other problems of `groups`."""
        texts = _Texts(self, reader)
        successes = [one for group in groups for one in whole_episodes(group.rollouts) if self.is_success(one)]
        readings: list[Reading | None] = []
        for group in groups:
            strangers: list[Rollout] = []
            if self.control is not None and self.control.kind != "random_peer":
                strangers = [rollout for rollout in successes if rollout.problem_id != group.problem.id]
                strangers = self._ordered(strangers, (*identity, "strangers", group.problem.id))
            readings += self._read_group(group, strangers, texts, identity, reading)
        return readings

    def choose(self, ordered: Sequence[Rollout], own: Rollout, reading: int = 0) -> list[Pick]:
        """Who fills which slot for one rollout of the group, taken in this order. Slots left empty are missing. Every
        further reading passes over whom the ones before it took."""
        successes = [peer for peer in self._others(ordered, own) if self.is_success(peer)]
        failures = [peer for peer in self._others(ordered, own) if not self.is_success(peer)]
        if self.failures == "when_no_solution" and successes:
            failures = []
        of_failures = self.slots.count("failure")
        next_success = iter(successes[reading * (len(self.slots) - of_failures) :])
        next_failure = iter(failures[reading * of_failures :])
        picks = []
        for slot, kind in zip(self.slots, self.kinds, strict=True):
            peer = next(next_failure if slot == "failure" else next_success, None)
            if peer is not None:
                picks.append(Pick(kind, peer, hidden=slot == "hidden_success"))
        return picks

    def _read_group(
        self, group: Group, strangers: Sequence[Rollout], texts: _Texts, identity: Identity, reading: int
    ) -> list[Reading | None]:
        siblings = whole_episodes(group.rollouts)
        ordered = self._ordered(siblings, identity)
        reordered = self._ordered(siblings, (*identity, "control"))  # or a random peer would follow the baseline
        readings: list[Reading | None] = []
        for own in group.rollouts:
            picks = self.choose(ordered, own, reading)
            if reading and not picks:
                readings.append(None)  # its feedback and summaries were shown before
                continue
            shown: list[Pick] | None = [pick for pick in picks if not pick.hidden]
            if self.control is not None and shown:
                hidden = {pick.peer.key for pick in picks if pick.hidden}
                free = [peer for peer in self._others(ordered, own) if peer.key not in hidden]
                pool = Pool(
                    siblings=[peer for peer in self._others(reordered, own) if peer.key not in hidden],
                    successes=[peer for peer in free if self.is_success(peer)],
                    strangers=strangers,
                )
                shown = control_picks(self.control, shown, pool, texts.num_tokens, may_repeat=self.order == "published")
            if shown is None:
                readings.append(None)
                continue
            blocks = [texts.demonstration(pick.kind, pick.peer) for pick in shown]
            blocks += [texts.summary(peer) for peer in self._summarised(ordered, own, picks)]
            blocks += [texts.feedback(own)] if self._shows_feedback(own, picks) else []
            readings.append(self._reading(group, blocks) if blocks else None)
        return readings

    def _reading(self, group: Group, blocks: Sequence[Block]) -> Reading:
        return Reading(
            messages=self.wording.compose(group.problem.messages, blocks),
            sources=tuple(block.source for block in blocks if block.source is not None),
            num_truncated_tokens=sum(block.num_truncated_tokens for block in blocks),
            shown=tuple(self._shown_as(block.kind) for block in blocks),
        )

    def _shown_as(self, kind: BlockKind) -> str:
        """A control's peers are what the control is called: their verdict is not what chose them."""
        if self.control is not None and kind in ("success", "another", "failure"):
            return self.control.kind
        return "success" if kind == "another" else kind

    def _ordered(self, rollouts: Sequence[Rollout], identity: Identity) -> list[Rollout]:
        if self.order == "published":
            return list(rollouts)
        return sorted(rollouts, key=lambda rollout: seed_from(*identity, *rollout.key))

    def _others(self, ordered: Sequence[Rollout], own: Rollout) -> list[Rollout]:
        """Everyone graded whom this rollout may be shown."""
        keeps_own = not self.exclude_own_success and self.is_success(own)
        own_key = (own.problem_id, own.episode_id)
        graded = [peer for peer in ordered if peer.reward is not None]
        return [peer for peer in graded if keeps_own or (peer.problem_id, peer.episode_id) != own_key]

    def _summarised(self, ordered: Sequence[Rollout], own: Rollout, picks: Sequence[Pick]) -> list[Rollout]:
        if self.summaries is None:
            return []
        taken = {pick.peer.key for pick in picks}
        wanted = {"success": (True,), "failure": (False,), "all": (True, False)}[self.summaries.of]
        free = [peer for peer in self._others(ordered, own) if peer.key not in taken]
        return [peer for peer in free if self.is_success(peer) in wanted][: self.summaries.count]

    def _shows_feedback(self, own: Rollout, picks: Sequence[Pick]) -> bool:
        if self.feedback == "never" or own.feedback is None or not own.feedback.strip():
            return False
        if own.reward is None:
            return False  # what an ungraded answer is told is about the grader
        solved = any(pick.kind == "success" and not pick.hidden for pick in picks)
        return self.feedback == "always" or not solved


class _Texts:
    """What the rollouts of one step say: each decoded and cut once, however many siblings are shown it."""

    def __init__(self, peers: Peers, reader: Reader) -> None:
        self._peers = peers
        self._reader, self._cut = reader, cache(reader.cut)
        self._known: dict[tuple[tuple[str, int], bool], tuple[str, int]] = {}

    def demonstration(self, kind: PeerKind, peer: Rollout) -> Block:
        said = self._said(peer, success=kind != "failure")
        return self._block(kind, said, self._peers.max_tokens_per_peer, peer.key)

    def summary(self, peer: Rollout) -> Block:
        assert self._peers.summaries is not None
        success = bool(self._peers.is_success(peer))
        text, num_cut = self._said(peer, success=success)
        said = summary_of(text, self._peers.summaries.tag), num_cut
        return self._block("summary" if success else "failed_summary", said, self._peers.summaries.max_tokens, peer.key)

    def feedback(self, own: Rollout) -> Block:
        assert own.feedback is not None
        return self._block("feedback", (own.feedback, 0), self._peers.max_feedback_tokens, None)

    def num_tokens(self, kind: PeerKind, peer: Rollout) -> int:
        return self._cut(self.demonstration(kind, peer).text, 0)[1]

    def _said(self, rollout: Rollout, *, success: bool) -> tuple[str, int]:
        """What it is shown to say, and how many tokens of it were cut already."""
        stripped = self._peers.remove_thinking == "always" or (success and self._peers.remove_thinking == "successes")
        key = (rollout.key, stripped)
        if key not in self._known:
            said = without_thinking if stripped else str
            self._known[key] = transcript(rollout, self._reader, said, self._cut)
        return self._known[key]

    def _block(self, kind: BlockKind, said: tuple[str, int], budget: int, source: tuple[str, int] | None) -> Block:
        text, num_cut = self._cut(said[0], budget)
        return Block(kind=kind, text=text, source=source, num_truncated_tokens=num_cut + said[1])


def _faults(peers: Peers) -> Iterator[str]:
    """What cannot be meant, in sentences that name the keys."""
    shown = [kind for slot, kind in zip(peers.slots, peers.kinds, strict=True) if slot != "hidden_success"]
    if not shown and peers.summaries is None and peers.feedback == "never":
        yield 'context.slots shows no peer, and nothing else is shown; add a slot, or use context.kind = "none"'
    if peers.failures == "when_no_solution" and "failure" not in peers.slots:
        yield 'context.failures = "when_no_solution" needs a "failure" in context.slots; add one, or remove the key'
    if peers.failures == "when_no_solution" and set(peers.slots) == {"failure"}:
        yield (
            'context.failures = "when_no_solution" needs a success in context.slots that can be missing; add '
            '"hidden_success", or remove the key'
        )
    if peers.control is not None:
        yield from _control_faults(peers, peers.control)
    yield from _wording_faults(peers, shown)


def _control_faults(peers: Peers, control: Control) -> Iterator[str]:
    if set(peers.slots) <= {"hidden_success"}:
        yield "context.control replaces peers, but context.slots shows none; add a slot, or remove the control"
    if peers.summaries is not None:
        yield "context.control is matched to context.slots alone; remove context.summaries, or the control"
    if control.kind == "success_only" and "failure" not in peers.slots:
        yield (
            'context.control.kind = "success_only" shows successes in place of failures, but context.slots has no '
            '"failure"; add one, or use another control'
        )


def _wording_faults(peers: Peers, shown: Sequence[PeerKind]) -> Iterator[str]:
    layout = peers.wording.layout
    if peers.control is not None and peers.control.kind != "random_peer":
        shown = ("success", "another")
    needed: list[BlockKind] = [*shown]
    if peers.summaries is not None:
        needed.append("summary")
    if peers.feedback != "never":
        needed.append("feedback")
    for kind in needed:
        if PLACES[kind] not in layout:
            yield f"context.wording.layout has no {PLACES[kind]}, which this context shows; add it"
            return
    places = [layout.find(PLACES[kind]) for kind in shown]
    if places != sorted(places):
        yield (
            f"context.slots = {list(peers.slots)} is not the order in which context.wording.layout shows them: "
            f"{layout!r}; change one of the two"
        )
