"""What every view reads and says of the answers of a step."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.contexts import build_views
from opdkit.training.models.teacher import Teacher
from opdkit.training.state import State
from opdkit.types import Asked, Example, Group, Rollout, Signal, View

Read = tuple[int, tuple[int, ...], Asked]  # which rollout, what is read before it, what is asked of its tokens


def view_groups(state: State, groups: Sequence[Group]) -> list[dict[str, View]]:
    """What is read for each rollout, by reading; one that has nothing to read is missing."""
    found: list[dict[str, View]] = [{} for group in groups for _ in group.rollouts]
    for view in state.needs.views:
        viewer = state.viewers[view]
        identity = (state.seed, state.step, "context")  # not the view: views of one context are shown the same
        for number, name in enumerate(state.readings(view)):
            read = build_views(groups, viewer.context, viewer.teacher.renderer, identity, number)
            for own, shown in zip(found, read, strict=True):
                if shown is not None:
                    own[name] = shown
    return found


def score(state: State, groups: Sequence[Group], views: Sequence[dict[str, View]]) -> list[dict[str, Signal]]:
    """What each reading says of its rollout; missing where that is longer than the reader's positions. What several of
    one reader's views read alike is scored once."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    signals: list[dict[str, Signal]] = [{} for _ in rollouts]
    for teacher in dict.fromkeys(state.viewers[view].teacher for view in state.needs.views):
        names = {
            name: asked
            for view, asked in state.needs.views.items()
            if state.viewers[view].teacher is teacher
            for name in state.readings(view)
        }
        reads = {
            (row, name): (row, read[name].context_ids, asked)
            for row, read in enumerate(views)
            for name, asked in names.items()
            if name in read and _fits(teacher, read[name], rollouts[row])
        }
        said = _said(state, teacher, rollouts, list(dict.fromkeys(reads.values())))
        for (row, name), read_once in reads.items():
            signals[row][name] = said[read_once]
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


def _fits(teacher: Teacher, view: View, rollout: Rollout) -> bool:
    room = teacher.model.max_positions
    return room is None or len(view.context_ids) + len(rollout.answer_ids) <= room


def _said(state: State, teacher: Teacher, rollouts: Sequence[Rollout], reads: Sequence[Read]) -> dict[Read, Signal]:
    said: dict[Read, Signal] = {}
    for asked in dict.fromkeys(wanted for _, _, wanted in reads):
        some = [read for read in reads if read[2] == asked]
        contexts, answers = [read[1] for read in some], [rollouts[read[0]].answer_ids for read in some]
        signals = teacher.score(contexts, answers, asked, temperature=state.method.loss_temperature)
        said.update(zip(some, signals, strict=True))
    return said
