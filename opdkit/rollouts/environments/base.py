"""What an environment is: it says the prompt, answers what the model does, and says when an episode has ended.

    problem --reset--> messages --(model)--> Action --step--> Step --(model)--> Action ... until a Step is done

One object an episode, made with the options of the recipe, in a worker process (`workers.py`). Its methods may be
`async def`. Text and messages go in and out; token ids are the loop's business (`episodes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from opdkit.tasks.base import Grade
from opdkit.tasks.tool_calls import Call
from opdkit.types import Finish, Message, Problem

# Why a step went wrong: a call that no tool can take; a tool that raised; no result in time; and the environment itself
# failed, which says nothing of the model: such an episode has no reward.
Failure = Literal["invalid_call", "tool_error", "timeout", "crash"]
FAILURES: tuple[Failure, ...] = get_args(Failure)
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters": a JSON schema}}

__all__ = ["FAILURES", "Action", "Call", "Environment", "Failure", "Grade", "Step", "Tool", "Transcript", "Turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One turn of the model. calls: of its text, in order; `Call.fault` where one cannot be read."""

    text: str  # with its special tokens, without the stop token
    token_ids: tuple[int, ...] = ()  # as sampled, with the stop token
    calls: tuple[Call, ...] = ()
    finish: Finish = "stop"
    turn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an environment says to an action. messages: of role "tool" (with "name" and "tool_call_id") or "user".

    history: everything behind the prompt as the model is to read it from now on, of an environment that shows it
    another past than it had (turns left out, or told shorter); turns of the model have the role "assistant", and
    perhaps "tool_calls". A new row begins there. None: the model reads on, and then `messages`.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    reward: float | None = None  # of this turn; None: says nothing
    failure: Failure | None = None
    info: Mapping[str, float] = field(default_factory=dict)  # numbers to be shown as metrics
    history: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An action and what the environment said to it; None: nobody asked it (a limit ended the episode)."""

    action: Action
    step: Step | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A whole episode. ended: "answer", "done", "turn_limit", "token_limit", "invalid", "repeat" or "failure"."""

    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...]
    ended: str

    @property
    def last_text(self) -> str:
        """What the model wrote in its last turn: what a task grades."""
        return self.turns[-1].action.text if self.turns else ""


class Environment(Protocol):
    """One object per episode. `opdkit/rollouts/environments/` holds some; yours is a class of a file.

    May also have
        asks_columns = ("city",)              columns of the data that `reset` finds in problem.row; "*": every one
        grade(problem, transcript) -> Grade   default: the recipe's data.task grades the last turn of the model
        rewrites_history = True               a step may have a `history`; methods that compare whole rows refuse it
        repeatable = False                    reset and the same steps do not lead to the same state, or must not be
                                              taken twice: such an episode is lost where its worker is (default: True)
    """

    tools: Sequence[Tool]  # () for dialogue. Of the class, of the object, or set by `reset` for its episode

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        """The whole prompt, which ends with a user turn. Siblings have one seed: the same prompt and start."""
        ...

    def step(self, action: Action, seed: int) -> Step:
        """`action.calls` holds the calls that fit the tools' schemas; the others are answered already. None at all is
        an answer, or what is said in a dialogue."""
        ...

    def close(self) -> None:
        """The episode is over."""
        ...
