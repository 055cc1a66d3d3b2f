"""What a context is: it turns a problem, one rollout and its group into the chat turns the teacher reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from opdkit.types import Group, Message, Rollout, TeacherView


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the teacher reads for one rollout, before it is rendered to token ids."""

    messages: tuple[Message, ...]
    sources: tuple[tuple[str, int], ...] = ()
    num_truncated_tokens: int = 0


# Cuts a text to a number of tokens; returns the text and how many tokens were cut.
Cut = Callable[[str, int], tuple[str, int]]


class Context(BaseModel, ABC):
    """Base of every context. The fields of a subclass are its recipe keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str

    @abstractmethod
    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading | None:
        """None: there is nothing to show for this rollout; it leaves the batch, and is counted."""


def build_views(
    groups: Sequence[Group], context: Context, render: Callable[[Sequence[Message]], Sequence[int]], cut: Cut
) -> list[TeacherView | None]:
    """One view per rollout, in the order of the groups. `render` and `cut` are the teacher's own."""
    views: list[TeacherView | None] = []
    for group in groups:
        for rollout in group.rollouts:
            reading = context.read(group, rollout, cut)
            views.append(
                reading
                and TeacherView(
                    context_ids=tuple(render(reading.messages)),
                    sources=reading.sources,
                    num_truncated_tokens=reading.num_truncated_tokens,
                )
            )
    return views
