"""Where episodes are played: the environment, how the model reads it, when it is enough, and what was counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from opdkit.contexts.render import Renderer
from opdkit.contexts.suffix import Role, Suffixes
from opdkit.rollouts.environments.workers import Pool
from opdkit.rollouts.episode import Limits
from opdkit.rollouts.tools import CallFormat

History = Literal["keep", "rerender"]


@dataclass(slots=True)
class Counts:
    """Of the turns that were sampled, besides what rows say."""

    num_turns: int = 0
    num_reencoded: int = 0  # whose text is encoded to other ids than were sampled
    num_at_text: int = 0  # that a text ended
    drift: list[int] = field(default_factory=list)  # tokens that the chat template would show otherwise, by episode

    @classmethod
    def sum(cls, parts: Sequence[Counts]) -> Counts:
        """Of several processes, which played other episodes each."""
        return cls(
            num_turns=sum(one.num_turns for one in parts),
            num_reencoded=sum(one.num_reencoded for one in parts),
            num_at_text=sum(one.num_at_text for one in parts),
            drift=[num for one in parts for num in one.drift],
        )


@dataclass(slots=True, kw_only=True)
class Stage:
    """Where episodes are played: the environment's workers, how the model reads them, and when it is enough.

    stop_ids      what ends a sampled turn
    calls         how the model writes calls; None: it has no tools to call
    shows_tools   whether the chat template tells it of them
    stop          texts that end a sampled turn, too
    go_ahead      whether a round begins with those whose environments have answered, or waits for all
    """

    pool: Pool
    limits: Limits
    stop_ids: frozenset[int]
    calls: CallFormat | None
    shows_tools: bool = True
    role: Role = "tool"
    closers: tuple[str, ...] = ()
    history: History = "keep"
    go_ahead: bool = False
    stop: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)
    has_begun: bool = False  # whether an episode ever did
    num_barren: int = 0  # calls in a row, up to now, in which none did
    last_suffixes: Suffixes | None = None
    failed: dict[str, bool] = field(default_factory=dict)  # why environments failed -> whether it was told

    def new_failures(self) -> list[str]:
        """A sentence for each way in which an environment has failed that was not told of yet."""
        fresh = [why for why, is_told in self.failed.items() if not is_told]
        self.failed.update(dict.fromkeys(fresh, True))
        return [
            f"the environment {self.pool.name} failed in an episode, which stays without a reward: {why}"
            for why in fresh
        ]

    def taken(self) -> Counts:
        """What was counted since the last call."""
        counted, self.counts = self.counts, Counts()
        return counted

    def suffixes(self, renderer: Renderer) -> Suffixes:
        """Episodes that offer the same tools share one: it is made of the whole vocabulary."""
        if self.last_suffixes is None or self.last_suffixes.renderer != renderer:
            self.last_suffixes = Suffixes(renderer, self.stop_ids, self.closers, self.role)
        return self.last_suffixes
