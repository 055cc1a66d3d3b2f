"""All answers to one problem side by side: outcome, tokens, what each view read before them, which peers it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from opdkit.contexts.transcript import whole_episodes
from opdkit.reporting.figures.heatmap import heat_map
from opdkit.reporting.figures.tokens import Decode, loss_parts
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import compact, score, shortened
from opdkit.types import Example, Message, Problem, Rollout, View

NUM_SIDE = 16  # answers beside each other
NUM_PLAIN = 1_500  # tokens of the beginning, and of the end, of an answer that is shown without colours
TITLE_LENGTH = 160  # characters of a question

Key = tuple[str, int]  # (problem id, sample id)


@dataclass(frozen=True, slots=True)
class Group:
    problem: Problem
    rows: Sequence[Example]
    mean: float | None  # reward; None: no answer was graded

    @property
    def is_mixed(self) -> bool:
        return len({row.rollout.reward for row in self.rows}) > 1


@dataclass(slots=True)
class Step:
    """What a card needs to know beside its own row."""

    all_rows: Sequence[Example]
    scale: float  # of the heat-map's colours
    decode: Decode | None
    tokens_left: int  # that may still get a colour on this page
    num_uncoloured: int = 0  # answers that got none, since no tokens were left
    rows: Mapping[Key, Example] = field(init=False)
    any_taught: bool = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {row.rollout.key: row for row in self.all_rows}
        self.any_taught = any(row.taught for row in self.all_rows)

    def text(self, ids: Sequence[int]) -> str:
        return shortened(self.decode(ids) if self.decode else " ".join(map(str, ids)))


def groups_of(rows: Sequence[Example]) -> list[Group]:
    """The answers of each problem, in the order of the rows."""
    found: dict[str, list[Example]] = {}
    for row in rows:
        found.setdefault(row.problem.id, []).append(row)
    groups = []
    for same in found.values():
        episodes = whole_episodes([row.rollout for row in same])
        rewards = [rollout.reward for rollout in episodes if rollout.reward is not None]
        mean = sum(rewards) / len(rewards) if rewards else None
        groups.append(Group(same[0].problem, sorted(same, key=lambda row: row.rollout.sample_id), mean))
    return groups


def kinds(row: Example, step: Step) -> list[str]:
    """What an answer can be searched by."""
    rollout = row.rollout
    reward = rollout.reward
    found = ["ungraded" if reward is None else "right" if reward >= 1 else "wrong" if reward <= 0 else "between"]
    found += ["cut"] if rollout.finish == "length" else []
    found += ["untaught"] if row.taught is None and step.any_taught else []
    found += ["peers"] if any(view.sources for view in row.views.values()) else []
    if rollout.turns or len(np.unique(rollout.turn_numbers)) > 1:
        found += ["turns", rollout.ended]
    return found


def group_of_answers(group: Group, place: int, step: Step) -> Html:
    """place: among the groups of the page, from 0; the first is open."""
    shown = group.rows[:NUM_SIDE]
    anchors = {row.rollout.key: f"g{place}a{index}" for index, row in enumerate(shown)}
    shared = _shared_views(group.rows)
    cards = [_card(row, anchors, shared, step) for row in shown]
    more = len(group.rows) - len(shown)
    return tag(
        "details",
        tag("summary", tag("span", _title(group.problem)), tag("span", _outcomes(group), class_="quiet")),
        tag("div", *(_message(each) for each in group.problem.messages), _facts(group.problem), class_="asked"),
        *(_reading(name, view, row, step, "before every answer") for name, (row, view) in shared.items()),
        tag("div", *cards, class_="side"),
        tag("p", f"{more:,} more answers to this problem are not on the page.", class_="quiet small") if more else None,
        class_="group",
        id=f"g{place}",
        data_i=place,
        data_r="-1" if group.mean is None else group.mean,
        data_loss=sum(_loss(row) for row in group.rows),
        **({"open": "open"} if place == 0 else {}),
    )


def _loss(row: Example) -> float:
    parts_T = loss_parts(row)
    return 0.0 if parts_T is None else float(np.nansum(np.abs(parts_T)))


def _title(problem: Problem) -> str:
    """The beginning of what was asked."""
    text = " ".join(_content(problem.messages[-1]).split()) if problem.messages else problem.id
    return text[:TITLE_LENGTH] + " …" * (len(text) > TITLE_LENGTH) if text else problem.id


def _outcomes(group: Group) -> str:
    signs = "".join(_sign(row.rollout.reward) for row in group.rows[: 2 * NUM_SIDE])
    return f"{signs} mean {score(group.mean)}" if group.mean is not None else "not graded"


def _sign(reward: float | None) -> str:
    return "?" if reward is None else "✓" if reward >= 1 else "✗" if reward <= 0 else "~"


def _facts(problem: Problem) -> Html:
    tools = ", ".join(map(_tool_name, problem.tools)) or None
    facts = [("problem", problem.id), ("gold", problem.gold), ("tools", tools)]
    chips = [tag("span", f"{name} ", tag("bdi", shortened(value))) for name, value in facts if value is not None]
    own = tag("pre", shortened(problem.solution)) if problem.solution else None
    return join(tag("div", *chips, class_="chips"), _closed("The data set's own solution", own) if own else None)


def _tool_name(tool: Mapping[str, object]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "?")) if isinstance(function, Mapping) else "?"


def _message(message: Message) -> Html:
    calls = message.get("tool_calls")
    said = join(tag("p", str(message.get("role", "")), class_="role"), tag("pre", shortened(_content(message))))
    return tag("div", said, tag("pre", shortened(str(calls))) if calls else None)


def _content(message: Message) -> str:
    return str(message.get("content") or "")


def _card(row: Example, anchors: Mapping[Key, str], shared: Mapping[str, object], step: Step) -> Html:
    rollout = row.rollout
    anchor = anchors[rollout.key]
    readings = [_reading(name, view, row, step) for name, view in row.views.items() if name not in shared]
    history = [_message(each) for each in rollout.history]
    return tag(
        "article",
        _chips(row, step),
        _peers(row, anchors, step),
        _closed(f"What was said before ({len(history)} messages)", *history) if history else None,
        tag("p", "answer" if step.decode else "answer, as token ids", class_="role"),
        _tokens(row, anchor, step),
        tag("p", "feedback", class_="role") if rollout.feedback else None,
        tag("pre", shortened(rollout.feedback)) if rollout.feedback else None,
        *readings,
        id=anchor,
        data_f=" ".join(kinds(row, step)),
    )


def _tokens(row: Example, anchor: str, step: Step) -> Html:
    """Coloured, or where the page has enough of those the beginning and the end as text."""
    ids = row.rollout.answer_ids
    if step.tokens_left > 0:
        most = step.tokens_left
        step.tokens_left -= min(len(ids), most)
        return heat_map(row, step.scale, step.decode, anchor, most)
    step.num_uncoloured += 1
    if len(ids) <= 2 * NUM_PLAIN:
        return tag("pre", step.text(ids), class_="answer")
    left = f"\n[{len(ids) - 2 * NUM_PLAIN:,} tokens are not shown]\n"
    return tag("pre", step.text(ids[:NUM_PLAIN]), left, step.text(ids[-NUM_PLAIN:]), class_="answer")


def _peers(row: Example, anchors: Mapping[Key, str], step: Step) -> Html | None:
    """Which answers each view was shown: those beside this one as links, others in full."""
    lines = []
    for name, view in row.views.items():
        if not view.sources:
            continue
        here = [tag("a", f"answer {key[1]}", href=f"#{anchors[key]}") for key in view.sources if key in anchors]
        links = [piece for link in here for piece in (", ", link)][1:]
        others = [_other_peer(key, step) for key in view.sources if key not in anchors]
        lines.append(join(tag("p", f"{_who(name)} was shown ", *links, class_="role") if here else None, *others))
    return join(*lines) if lines else None


def _other_peer(key: Key, step: Step) -> Html:
    peer = step.rows.get(key)
    if peer is None:
        return tag("p", f"shown: answer {key[1]}, which was not saved", class_="role")
    reward = "" if peer.rollout.reward is None else f", reward {compact(peer.rollout.reward)}"
    words = f"shown: answer {key[1]} to problem {key[0]}{reward}"
    return _closed(words, tag("pre", step.text(peer.rollout.answer_ids), class_="peer"))


def _shared_views(rows: Sequence[Example]) -> dict[str, tuple[Example, View]]:
    """The views that read the same before every answer of a group: they are shown once."""
    first = rows[0]
    if len(rows) < 2:
        return {}
    return {
        name: (first, view)
        for name, view in first.views.items()
        if all(name in row.views and _same_reading(row.views[name], view) for row in rows[1:])
    }


def _same_reading(one: View, other: View) -> bool:
    return one.context_ids == other.context_ids and (one.by, one.num_truncated_tokens) == (
        other.by, other.num_truncated_tokens)  # fmt: skip


def _who(view: str) -> str:
    return "the teacher" if view == "teacher" else f"view {view}"


def _reading(name: str, view: View, row: Example, step: Step, when: str = "before it") -> Html:
    """All that a view read before the answer, what the student did not read set off. Closed."""
    prompt, context = row.rollout.prompt_ids, view.context_ids
    by = f", by view {view.by}" if view.by else ""
    if context == prompt:
        return tag("p", f"{_who(name)} read {when} what the student read{by}", class_="role")
    cut = f", {view.num_truncated_tokens:,} cut to fit" if view.num_truncated_tokens else ""
    words = f"What {_who(name)} read {when} ({len(context):,} tokens, the student {len(prompt):,}{cut}{by})"
    return _closed(words, tag("pre", *_set_off(prompt, context, step)))


def _set_off(prompt: Sequence[int], context: Sequence[int], step: Step) -> list[str | Html]:
    """The common beginning and end of both, quiet, around what is the view's own."""
    most = min(len(prompt), len(context))
    start = next((i for i in range(most) if prompt[i] != context[i]), most)
    end = next((i for i in range(most - start) if prompt[-1 - i] != context[-1 - i]), most - start)
    whole = step.text(context)
    if step.decode is None or not start + end:
        return [whole]
    pieces = [step.decode(context[:start]), step.decode(context[start : len(context) - end]),
              step.decode(context[len(context) - end :])]  # fmt: skip
    if "".join(pieces) != whole:  # cut inside a character, or too long to be shown whole
        return [whole]
    return [tag("span", pieces[0], class_="quiet"), tag("span", pieces[1], class_="own"),
            tag("span", pieces[2], class_="quiet")]  # fmt: skip


def _closed(title: str, *inside: str) -> Html:
    return tag("details", tag("summary", title), *inside)


def _chips(row: Example, step: Step) -> Html:
    rollout = row.rollout
    of_episode = f", episode {rollout.episode}" if rollout.episode is not None else ""
    facts: list[tuple[str, str | None, str | None]] = [
        (f"answer {rollout.sample_id}{of_episode}", "", None),
        (f"{_sign(rollout.reward)} reward", _reward_in_words(rollout), "outcome"),
        ("read as", None if rollout.parsed is None else shortened(rollout.parsed), None),
        ("tokens", f"{len(rollout.answer_ids):,}", None),
        ("turns", f"{len(rollout.turns):,}" if rollout.turns else None, None),
        ("ended", None if rollout.ended == "answer" else rollout.ended.replace("_", " "), "flag"),
        ("cut at the length limit", "" if rollout.finish == "length" else None, "flag"),
        ("taught nothing: the loss did not read it", "" if row.taught is None and step.any_taught else None, "flag"),
    ]
    chips = [
        tag("span", f"{name} " if value else name, tag("bdi", value) if value else None, class_=tone)
        for name, value, tone in facts
        if value is not None
    ]
    return tag("div", *chips, class_="chips")


def _reward_in_words(rollout: Rollout) -> str | None:
    """None: the data set's own answer, of which nobody asked."""
    if rollout.reward is None:
        return None if rollout.answer_logprobs is None else "unknown"
    return compact(rollout.reward)
