"""What the teacher reads while it scores an answer: the named conditions of MOPD's analysis, in two designs.

    fixed      some answers of every problem are held out, drawn by a seed: they are what is shown, and all others are
               scored. Under one condition every scored answer of a problem is read behind the same context (its own
               feedback apart), and under all conditions the same answers are scored. So what is ranked is answers.
    siblings   each answer is read behind its own siblings, as in training and in the published analysis: a success sees
               one success fewer than a failure does, and the ranking mixes the quality of the answer with that.

The fixed design never holds out the last success or the last failure of a problem: without either there is nothing to
rank. A condition that finds fewer answers to show than it asks for shows what there is, and is not `effective` there.
The contexts themselves (blocks, wording, budgets, order of peers) are those of training, `opdkit.contexts.peers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from opdkit.contexts.base import Reader, Reading
from opdkit.contexts.blocks import Wording
from opdkit.contexts.controls import Control
from opdkit.contexts.peers import Identity, Peers, Slot, Summaries
from opdkit.errors import UserError
from opdkit.recipe.fields import did_you_mean
from opdkit.types import Group, Message, Rollout, seed_from

Design = Literal["fixed", "siblings"]
NUM_BEST = 3  # answers that verifier_score_ordered shows: as many as two successes and a failure
CHOSEN_BY_CONDITION = {"kind", "slots", "failures", "feedback", "summaries", "control", "exclude_own_success"}
NUM_SUMMARIES = 2  # the k2 of the names


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    name: str
    shows: str
    slots: tuple[Slot, ...] = ()
    summaries: Literal["success", "all"] | None = None
    feedback: bool = False
    shown: Literal["peers", "random", "best", "strangers", "shell", "nothing"] = "peers"
    holds: tuple[int, int] = (0, 0)  # successes and failures the fixed design holds out for it, where it can


_TWO_AND_ONE: tuple[Slot, ...] = ("success", "success", "failure")
_SUCCESS: tuple[Slot, ...] = ("success",)
_FAILURE: tuple[Slot, ...] = ("failure",)
CONDITIONS: Mapping[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition(name="base", shows="the question, as the student read it", shown="nothing"),
        Condition(name="base_reprompt", shows="the question and the closing sentence, no answers", shown="shell"),
        Condition(name="solution", shows="a success", slots=("success",), holds=(1, 0)),
        Condition(
            name="another_solution",
            shows="a success, but not the one of `solution`",
            slots=("hidden_success", "success"),
            holds=(2, 0),
        ),
        Condition(name="solution+another_solution", shows="two successes", slots=("success", "success"), holds=(2, 0)),
        Condition(name="failure_solution", shows="a failure, named as one", slots=("failure",), holds=(0, 1)),
        Condition(
            name="solution+failure_solution",
            shows="a success and a failure",
            slots=("success", "failure"),
            holds=(1, 1),
        ),
        Condition(
            name="solution+another_solution+failure_solution",
            shows="two successes and a failure (MOPD)",
            slots=_TWO_AND_ONE,
            holds=(2, 1),
        ),
        Condition(name="feedback", shows="the answer's own feedback", feedback=True),
        Condition(
            name="solution+feedback",
            shows="a success and the answer's own feedback (SDPO)",
            slots=("success",),
            feedback=True,
            holds=(1, 0),
        ),
        Condition(
            name="summary_success_k2", shows="summaries of up to two successes", summaries="success", holds=(2, 0)
        ),
        Condition(
            name="solution+summary_success_k2",
            shows="a success and summaries of up to two others",
            slots=("success",),
            summaries="success",
            holds=(2, 0),
        ),
        Condition(
            name="solution+feedback+summary_all_k2",
            shows="a success, own feedback and summaries of up to two other answers",
            slots=("success",),
            summaries="all",
            feedback=True,
            holds=(1, 1),
        ),
        Condition(
            name="random_summary_control",
            shows="summaries of two answers to other problems",
            summaries="all",
            shown="strangers",
        ),
        Condition(
            name="random_peer",
            shows="the places of MOPD's two successes and failure, filled whatever the verdict",
            slots=_TWO_AND_ONE,
            shown="random",
            holds=(2, 1),
        ),
        Condition(
            name="verifier_score_ordered",
            shows=f"the {NUM_BEST} answers with the highest reward, each as what it is",
            slots=_SUCCESS * NUM_BEST + _FAILURE * NUM_BEST,
            shown="best",
            holds=(2, 1),
        ),
    )
}
PEERS = {c.name for c in CONDITIONS.values() if c.slots and not (c.summaries or c.feedback or c.shown == "best")}
ALIASES: Mapping[str, str] = {  # names of the published analysis for the same thing, and the short ones of the paper
    "base_raw": "base",
    "all_solutions": "solution+another_solution",
    "failure_only": "failure_solution",
    "1S": "solution",
    "2S": "solution+another_solution",
    "1F": "failure_solution",
    "1S1F": "solution+failure_solution",
    "2S1F": "solution+another_solution+failure_solution",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One context of one problem under one condition, and the answers that are scored behind it."""

    condition: str
    problem_id: str
    sample_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    sources: tuple[tuple[str, int], ...]
    num_truncated_tokens: int
    effective: bool


def conditions_of(names: str) -> tuple[Condition, ...]:
    """ "base,2S1F" or "all" -> conditions, each once, in the order of the table. Raises UserError for another name."""
    wanted = set(CONDITIONS) if names.strip() == "all" else set()
    for name in [] if wanted else [part.strip() for part in names.split(",") if part.strip()]:
        if ALIASES.get(name, name) not in CONDITIONS:
            raise UserError(f"--conditions {name} does not exist{did_you_mean(name, [*CONDITIONS, *ALIASES])}")
        wanted.add(ALIASES.get(name, name))
    if not wanted:
        raise UserError(f"--conditions names none; choose from {', '.join(CONDITIONS)}, or all")
    return tuple(condition for name, condition in CONDITIONS.items() if name in wanted)


def showable(conditions: Sequence[Condition], peers: Peers) -> tuple[list[Condition], dict[str, list[str]]]:
    """Those that the wording of `peers` has places for; and why others have none: reason -> names."""
    kept: list[Condition] = []
    reasons: dict[str, list[str]] = {}
    for condition in conditions:
        try:
            if condition.shown not in ("nothing", "shell"):
                _context(condition, peers)
            kept.append(condition)
        except UserError as error:
            reasons.setdefault(str(error), []).append(condition.name)
    return kept, reasons


def peers_of(settings: Mapping[str, Any]) -> Peers:
    """What all conditions share: a [context] of kind "peers" without who is shown. Raises UserError for other keys."""
    chosen = CHOSEN_BY_CONDITION & settings.keys()
    if chosen:
        raise UserError(
            f"--context {sorted(chosen)[0]} is what a condition chooses; leave it out, and name --conditions instead"
        )
    return _validated({"slots": ("success",), "feedback": "never", **settings})


def _validated(keys: Mapping[str, Any]) -> Peers:
    try:
        return Peers.model_validate({"kind": "peers", **keys})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f".{part}" for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = did_you_mean(str(first["loc"][-1]), [*Peers.model_fields, *Wording.model_fields])
            raise UserError(f"context{where} does not exist{near} (--context)") from None
        raise UserError(f"context{where}: {first['msg'].removeprefix('Value error, ')} (--context)") from None


def show(
    groups: Sequence[Group], conditions: Sequence[Condition], peers: Peers, reader: Reader, *, design: Design, seed: int
) -> list[Shown]:
    """Every context of every problem. All rollouts are graded; `peers` as `peers_of` makes it.

    Equal contexts of a problem under one condition are one, with all the answers behind it. A condition that has
    nothing to show reads the question alone.
    """
    identity = (seed, "signal")
    cached = _Cached(reader)
    splits = [_split(group, conditions, peers, design, identity) for group in groups]
    everyone = [rollout for split in splits for rollout in split.pool]
    shown: list[Shown] = []
    for condition in conditions:
        asks = [ask for split in splits for ask in _asks(condition, split, everyone, identity)]
        readings = _readings(condition, peers, asks, cached, identity)
        shown += _merged(condition, peers, asks, readings)
    return shown


def counts_of(shown: Sequence[Shown], groups: Sequence[Group]) -> Counter[str]:
    """How many problems and answers there are, and how many say word for word what the teacher was shown."""
    answers = {rollout.key: rollout.answer_ids for group in groups for rollout in group.rollouts}
    scored = {(one.problem_id, sample_id) for one in shown for sample_id in one.sample_ids}
    seen = {(one.problem_id, answers[source]) for one in shown for source in one.sources}
    return Counter(
        problems=len(groups),
        answers_scored=len(scored),
        answers_shown_and_not_scored=len(answers) - len(scored),
        answers_scored_that_equal_a_shown_one=sum((key[0], answers[key]) in seen for key in scored),
    )


def held_out(rollouts: Sequence[Rollout], holds: tuple[int, int], peers: Peers, identity: Identity) -> list[Rollout]:
    """The successes and failures of one problem that are shown and not scored; never the last one of a kind."""
    ordered = rollouts if peers.order == "published" else sorted(rollouts, key=lambda r: seed_from(*identity, *r.key))
    kinds = [[r for r in ordered if bool(peers.is_success(r)) == wanted] for wanted in (True, False)]
    return [r for kind, num in zip(kinds, holds, strict=True) for r in kind[: max(0, min(num, len(kind) - 1))]]


@dataclass(frozen=True, slots=True)
class _Split:
    """Who is shown and who is scored, of one problem. In the design `siblings` everybody is both."""

    group: Group
    pool: list[Rollout]
    scored: list[Rollout]
    design: Design


@dataclass(frozen=True, slots=True)
class _Ask:
    """What one answer (the last of the group) reads, and which answers (sample ids) are scored behind that."""

    group: Group
    behind: tuple[int, ...]

    @property
    def own(self) -> Rollout:
        return self.group.rollouts[-1]


def _split(group: Group, conditions: Sequence[Condition], peers: Peers, design: Design, identity: Identity) -> _Split:
    if design == "siblings":
        return _Split(group, list(group.rollouts), list(group.rollouts), design)
    holds = max(c.holds[0] for c in conditions), max(c.holds[1] for c in conditions)
    pool = held_out(group.rollouts, holds, peers, identity)
    keys = {rollout.key for rollout in pool}
    return _Split(group, pool, [rollout for rollout in group.rollouts if rollout.key not in keys], design)


def _asks(condition: Condition, split: _Split, everyone: Sequence[Rollout], identity: Identity) -> list[_Ask]:
    """One for all answers where their context cannot differ, else one for each."""
    ids = tuple(rollout.sample_id for rollout in split.scored)
    pool = split.pool
    if condition.shown == "strangers":
        pool = _strangers(split.group.problem.id, everyone, identity)
    elif condition.shown == "best":
        pool = sorted(pool, key=lambda r: (-(r.reward or 0.0), seed_from(*identity, *r.key)))
    own_pool = split.design == "siblings" and condition.shown in ("peers", "random", "best")
    asks = []
    for own in split.scored if own_pool or condition.feedback else split.scored[:1]:
        others = [rollout for rollout in pool if rollout.key != own.key]
        members = others[:NUM_BEST] if condition.shown == "best" else others
        behind = (own.sample_id,) if own_pool or condition.feedback else ids
        asks.append(_Ask(Group(problem=split.group.problem, rollouts=(*members, own)), behind))
    return asks


def _strangers(problem_id: str, everyone: Sequence[Rollout], identity: Identity) -> list[Rollout]:
    """Two answers to other problems, drawn for this problem."""
    others = len(everyone) - sum(rollout.problem_id == problem_id for rollout in everyone)
    found: dict[tuple[str, int], Rollout] = {}
    draw = 0
    while len(found) < min(NUM_SUMMARIES, others):
        rollout = everyone[seed_from(*identity, problem_id, "stranger", draw) % len(everyone)]
        draw += 1
        if rollout.problem_id != problem_id:
            found.setdefault(rollout.key, rollout)
    return list(found.values())


def _readings(
    condition: Condition, peers: Peers, asks: Sequence[_Ask], reader: Reader, identity: Identity
) -> list[Reading | None]:
    if condition.shown == "nothing":
        return [Reading(messages=ask.group.problem.messages) for ask in asks]
    if condition.shown == "shell":
        return [Reading(messages=peers.wording.compose(ask.group.problem.messages, ())) for ask in asks]
    read = iter(_context(condition, peers).read_groups([ask.group for ask in asks], reader, identity))
    return [[next(read) for _ in ask.group.rollouts][-1] for ask in asks]


def _context(condition: Condition, peers: Peers) -> Peers:
    summaries = condition.summaries and Summaries(count=NUM_SUMMARIES, of=condition.summaries)
    changes = {
        "slots": condition.slots,
        "feedback": "always" if condition.feedback else "never",
        "summaries": summaries,
        "control": Control(kind="random_peer") if condition.shown == "random" else None,
        "order": "published" if condition.shown == "best" else peers.order,  # they come in the order of their rewards
    }
    keys = {name: getattr(peers, name) for name in Peers.model_fields}
    return _validated({**keys, **changes})


def _merged(
    condition: Condition, peers: Peers, asks: Sequence[_Ask], readings: Sequence[Reading | None]
) -> list[Shown]:
    merged: dict[tuple[Any, ...], list[int]] = {}
    for ask, reading in zip(asks, readings, strict=True):
        found = reading or Reading(messages=ask.group.problem.messages)
        turns = tuple(tuple(message.items()) for message in found.messages)
        effective = _effective(condition, peers, ask, reading)
        key = (ask.group.problem.id, turns, found.sources, found.num_truncated_tokens, effective)
        merged.setdefault(key, []).extend(ask.behind)
    return [
        Shown(
            condition=condition.name,
            problem_id=problem_id,
            sample_ids=tuple(sorted(sample_ids)),
            messages=tuple(dict(turn) for turn in turns),
            sources=sources,
            num_truncated_tokens=num_truncated,
            effective=effective,
        )
        for (problem_id, turns, sources, num_truncated, effective), sample_ids in merged.items()
    ]


def _effective(condition: Condition, peers: Peers, ask: _Ask, reading: Reading | None) -> bool:
    """Whether everything the condition shows was there."""
    if condition.shown in ("nothing", "shell"):
        return True
    if reading is None:
        return False
    if condition.feedback and not (ask.own.feedback or "").strip():
        return False
    if condition.shown in ("best", "strangers"):
        return len(reading.sources) == (NUM_BEST if condition.shown == "best" else NUM_SUMMARIES)
    num_failures = condition.slots.count("failure")
    num_successes = len(condition.slots) - num_failures
    verdicts = [bool(peers.is_success(rollout)) for rollout in ask.group.rollouts[:-1]]
    if verdicts.count(True) < num_successes or verdicts.count(False) < num_failures:
        return False
    num_visible = len(condition.slots) - condition.slots.count("hidden_success")
    return condition.summaries is None or len(reading.sources) > num_visible


class _Cached:
    """A reader that decodes and cuts each text once, however many conditions show it."""

    def __init__(self, reader: Reader) -> None:
        self.prompt_ids: Callable[[Sequence[Message]], tuple[int, ...]] = reader.prompt_ids
        self.with_tools: Callable[[Sequence[Mapping[str, Any]]], Reader] = reader.with_tools
        self.torn: Callable[[str], str] = reader.torn
        self.answer_text: Callable[[Sequence[int]], str] = cache(reader.answer_text)
        self.cut: Callable[[str, int], tuple[str, int]] = cache(reader.cut)
