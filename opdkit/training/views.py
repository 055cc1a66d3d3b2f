"""What every view reads and says of the answers of a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from opdkit.engines.states import answered
from opdkit.recipe.sections import SpoolSection
from opdkit.training.deal import Deal
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.saved.spool import Spool, description
from opdkit.training.spans import check_coverage
from opdkit.training.state import State
from opdkit.types import Asked, Example, Group, Rollout, Signal, View, base_name

_DISTRIBUTION = Asked("distribution")
Read = tuple[int, tuple[int, ...], Asked]  # which rollout, what is read before it, what is asked of its tokens


def view_groups(state: State, groups: Sequence[Group]) -> list[dict[str, View]]:
    """What is read for each rollout, by reading; one that has nothing to read is missing."""
    found: list[list[dict[str, View]]] = [[{} for _ in group.rollouts] for group in groups]
    for view in state.needs.views:
        identity = (state.seed, state.step, "context")  # not the view: views of one context are shown the same
        for reader, places in _places(state, groups, view).items():
            viewer, own_groups = state.viewers[reader], [groups[place] for place in places]
            own = [row for place in places for row in found[place]]
            for number, name in enumerate(state.readings(view)):
                read = viewer.teacher.views(own_groups, viewer.context, identity, number, name)
                for row, shown in zip(own, read, strict=True):
                    if shown is not None:
                        row[name] = shown if reader == view else replace(shown, by=reader)
    return [row for rows in found for row in rows]


def _places(state: State, groups: Sequence[Group], view: str) -> dict[str, list[int]]:
    """Which groups each reader of a view reads."""
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(state.reader(view, group.problem), []).append(place)
    return found


def score(
    state: State,
    groups: Sequence[Group],
    views: Sequence[dict[str, View]],
    deal: Deal,
    chosen: Collection[tuple[str, int]] = (),
    heard: Callable[[Teacher, Rollout, Signal], None] = lambda teacher, rollout, signal: None,
) -> list[dict[str, Signal]]:
    """What each reading says of its rollout; missing where that is longer than the reader's positions. What several of
    one reader's views read alike is scored once. Every rank scores its own rows, with every teacher in turn.

    heard gets, of the rollouts with the chosen keys, what the view "teacher" says with hidden states and their head,
    and who said it, from the same passes, whatever was asked; nothing of a teacher that cannot say it.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    signals: list[dict[str, Signal]] = [{} for _ in rollouts]
    of_teacher: dict[Teacher, dict[tuple[int, str], Read]] = {}
    for row, read in enumerate(views):
        for name, asked in state.asked.items():
            if name in read:
                teacher = state.viewers[read[name].by or base_name(name)].teacher
                wanted = asked if state.spool is None else whole(teacher, asked)
                of_teacher.setdefault(teacher, {})[row, name] = (row, read[name].context_ids, wanted)
    for teacher, reads in of_teacher.items():
        reads = {key: read for key, read in reads.items() if teacher.fits(read[1], rollouts[read[0]].answer_ids)}
        kept = {read for (row, name), read in reads.items() if name == "teacher" and rollouts[row].key in chosen}
        said = _said(state, teacher, rollouts, list(dict.fromkeys(reads.values())), kept, deal)
        for (row, name), read_once in reads.items():
            if read_once not in said:
                continue
            signal, whole_asked = said[read_once], read_once[2].answer == "distribution"
            if name == "teacher" and read_once in kept and signal.head is not None:
                spans = teacher.spans_of(read_once[1], rollouts[row].answer_ids, _DISTRIBUTION)
                heard(teacher, rollouts[row], replace(signal, spans=spans))
            signals[row][name] = signal if whole_asked else replace(signal, hidden_TH=None, head=None)
    if state.spool is not None:
        state.spool.keep(state.step + 1, state.method.loss_temperature, rollouts, views, signals)
        signals = _as_asked(state, rollouts, signals)
    signals = deal.signals_of_all([rollout.key for rollout in rollouts], signals)
    check_coverage([(r, said.spans) for r, own in zip(rollouts, signals, strict=True) for said in own.values()])
    return signals


def join(
    groups: Sequence[Group], views: Sequence[dict[str, View]], signals: Sequence[dict[str, Signal]]
) -> list[Example]:
    """From here on nothing is parallel."""
    asked = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    return [
        Example(problem=problem, rollout=rollout, views=read, signals=said)
        for (problem, rollout), read, said in zip(asked, views, signals, strict=True)
    ]


def whole(teacher: Teacher, asked: Asked) -> Asked:
    """What is asked of a teacher whose word is kept, so that it can be asked anything later."""
    return _DISTRIBUTION if teacher.can_say(_DISTRIBUTION) else asked


def spool_of(state: State, folder: Path, section: SpoolSection) -> Spool:
    """Where this run's teachers are kept."""
    absent = state.student.head().absent_ids
    asked = {
        reader: whole(state.viewers[reader].teacher, wanted)
        for view, wanted in state.needs.views.items()
        for reader in state.readers(view)
    }
    described = description(
        asked,
        state.method.loss_temperature,
        num_tokens=state.student.num_tokens,
        absent_ids=[] if absent is None else absent.tolist(),
        tokenizer=state.student.tokenizer,
    )
    return Spool(folder, section, described, state.ranks)


def _as_asked(
    state: State, rollouts: Sequence[Rollout], signals: Sequence[dict[str, Signal]]
) -> list[dict[str, Signal]]:
    """What the method asked for, where hidden states were asked for to be kept."""
    found = [dict(said) for said in signals]
    for name, asked in state.asked.items():
        rows = [row for row, said in enumerate(signals) if name in said and said[name].hidden_TH is not None]
        known, answers = [signals[row][name] for row in rows], [rollouts[row].answer_ids for row in rows]
        for row, signal in zip(rows, answered(known, answers, asked, state.method.loss_temperature), strict=True):
            found[row][name] = signal
    return found


def _said(
    state: State,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    reads: Sequence[Read],
    kept: Collection[Read],
    deal: Deal,
) -> dict[Read, Signal]:
    """kept: reads whose hidden states are to come too."""
    said: dict[Read, Signal] = {}
    for asked in dict.fromkeys(wanted for _, _, wanted in reads):
        some = [read for read in reads if read[2] == asked and deal.is_own(rollouts[read[0]].key)]
        contexts, answers = [read[1] for read in some], [rollouts[read[0]].answer_ids for read in some]
        temperature, states_of = state.method.loss_temperature, [n for n, read in enumerate(some) if read in kept]
        signals = teacher.score(contexts, answers, asked, temperature=temperature, states_of=states_of)
        said.update(zip(some, signals, strict=True))
    return said
