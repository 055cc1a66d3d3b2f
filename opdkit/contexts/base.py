"""What a context is: it turns a problem, one rollout and its group into the chat turns the teacher reads."""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from opdkit.types import Group, Message, Problem, Rollout, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the teacher reads for one rollout, before it is rendered to token ids."""

    messages: tuple[Message, ...]
    sources: tuple[tuple[str, int], ...] = ()
    num_truncated_tokens: int = 0
    shown: tuple[str, ...] = ()  # see `View.shown`


# Cuts a text to a number of tokens; returns the text and how many tokens were cut.
Cut = Callable[[str, int], tuple[str, int]]


class Reader(Protocol):
    """How the teacher reads and writes; `Renderer` is one."""

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Reader: ...

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]: ...

    def answer_text(self, answer_ids: Sequence[int]) -> str: ...

    def torn(self, text: str) -> str: ...


class Context(BaseModel, ABC):
    """Base of every context. The fields of a subclass are its recipe keys.

    A context that looks at one rollout alone defines `read`; one that looks across rollouts defines `read_groups`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str

    @property
    def needs_siblings(self) -> bool:
        """Whether it only has something to show where a problem has several rollouts."""
        return False

    @property
    def needs_rewards(self) -> bool:
        """Whether it only has something to show where answers are graded."""
        return False

    @property
    def needs_solutions(self) -> bool:
        """Whether it only has something to show where a problem has a reference solution."""
        return False

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns of the data set that it shows."""
        return ()

    @property
    def reads_file(self) -> str | None:
        """The file that it shows, besides the data."""
        return None

    @property
    def shows_successes(self) -> bool:
        """Whether it means to show right answers of the group (`is_success`)."""
        return False

    def is_success(self, rollout: Rollout) -> bool | None:
        """Whether it would show this answer as a right one. None: not known."""
        return None

    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading | None:
        """None: there is nothing to show for this rollout; it leaves the teacher's part of the loss, and is counted."""
        raise NotImplementedError(f"{type(self).__name__} defines neither read nor read_groups")

    def read_groups(
        self, groups: Sequence[Group], reader: Reader, identity: tuple[int | str, ...], reading: int = 0
    ) -> list[Reading | None]:
        """One reading per rollout, in the order of the groups.

        `groups` are all of the step's. `identity` says which run and which step: it seeds whatever is drawn.
        `reading` counts the readings of a view that repeats (`count`): each has other evidence than those before it,
        or is None. A context that always shows the same has one.
        """
        if reading:
            return [None for group in groups for _ in group.rollouts]
        return [self.read(group, rollout, reader.cut) for group in groups for rollout in group.rollouts]


def build_views(
    groups: Sequence[Group], context: Context, reader: Reader, identity: tuple[int | str, ...], reading: int = 0
) -> list[View | None]:
    """One view per rollout, in the order of the groups. `reader` is the teacher's own; see `Context.read_groups`."""

    known: dict[str, tuple[int, ...]] = {}  # siblings often read the same

    def context_ids(problem: Problem, rollout: Rollout, shown: Reading) -> tuple[int, ...]:
        turns = [dict(turn) for turn in (*shown.messages, *rollout.history)]
        key = json.dumps([problem.tools, turns], default=dict)
        if key not in known:
            offering = reader.with_tools(problem.tools) if problem.tools else reader
            known[key] = tuple(offering.prompt_ids(turns))
        return known[key]

    asked = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    return [
        None
        if shown is None
        else View(
            context_ids=context_ids(problem, rollout, shown),
            sources=shown.sources,
            num_truncated_tokens=shown.num_truncated_tokens,
            shown=shown.shown,
        )
        for (problem, rollout), shown in zip(asked, context.read_groups(groups, reader, identity, reading), strict=True)
    ]
