"""[episode]: the student acts in an environment over several turns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdkit.recipe.fields import PositiveInt, Section, Strings
from opdkit.rollouts.environments.options import ChosenEnvironment
from opdkit.rollouts.tools import CallFormat

StopText = Annotated[str, Field(min_length=1, max_length=200)]
Seconds = Annotated[float, Field(gt=0)]


class EpisodeSection(Section):
    # A name, or a table with its options, { name = "my_env.py:Shop", shelves = 3 }: see `opdkit environments`.
    environment: ChosenEnvironment
    # How the model writes calls of tools. "auto": as its chat template shows them.
    calls: Literal["auto"] | CallFormat = "auto"
    # Who tells the model which tools there are: its chat template, or nobody but the environment's own prompt.
    show_tools: Literal["template", "no"] = "template"
    # The role of what the environment says; "user" for a chat template that has none for tools.
    observations: Literal["tool", "user"] = "tool"
    # What the model reads of its earlier turns. "keep": what it sampled, token for token; an episode is one row.
    # "rerender": what the chat template shows of them, as a server would; rows begin anew where that differs.
    history: Literal["keep", "rerender"] = "keep"
    # Tokens that end an assistant's turn in the history, where the model samples another (gpt-oss: ["<|end|>"]).
    turn_closers: Strings = ()
    # Texts that end a turn, of protocols that write their actions out (["Observation:"]): with the token that completes
    # one, which stays whole. The text is the model's own: the environment and the grader read it, and it is taught.
    stop: Annotated[tuple[StopText, ...], Field(strict=False, max_length=16)] = ()
    max_turns: PositiveInt = 8  # of the model
    max_turn_tokens: PositiveInt | None = None  # of one turn; default: sampling.max_answer_tokens
    # Of the model and the environment together, behind the prompt. Default: room for all turns and their answers.
    max_episode_tokens: PositiveInt | None = None
    max_observation_tokens: PositiveInt = 512  # of one thing that the environment says; longer: cut in the middle
    max_calls_per_turn: PositiveInt = 4  # further ones are refused
    max_invalid_calls: PositiveInt = 3  # calls that cannot be read, or that no tool can take; then the episode ends
    max_repeats: PositiveInt = 3  # turns in a row with the same calls and the same results; then the episode ends
    tool_timeout_s: Seconds = 10.0  # of one call; the model is told, and goes on
    episode_timeout_s: Seconds = 600.0  # of all that an environment does in one episode; then it has failed
    # An episode that a limit ended: the verdict on how far it came, or no reward.
    truncated: Literal["graded", "ungraded"] = "graded"
    workers: Annotated[int, Field(gt=0, le=256)] = 2  # processes that hold the environments
    # Whether episodes whose tools have answered go on without waiting for the others. It changes which episodes are
    # sampled together, and so the last bits of their numbers. Default: with a GPU or an engine of its own; on a CPU
    # all wait, and the same recipe gives the same bits.
    go_ahead: bool | None = None

    def turn_tokens(self, max_answer_tokens: int) -> int:
        """The most of one turn, in tokens."""
        return self.max_turn_tokens or max_answer_tokens

    def episode_tokens(self, max_answer_tokens: int) -> int:
        """The most of all turns, in tokens."""
        turn = self.turn_tokens(max_answer_tokens) + self.max_observation_tokens
        return self.max_episode_tokens or self.max_turns * turn
