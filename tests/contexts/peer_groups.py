"""Groups written as letters, and a reader whose tokens are words: what the tests of the peer context are made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opdkit.contexts import Reading
from opdkit.contexts.peers import Peers
from opdkit.types import Group, Message, Problem, Rollout

REWARDS = {"s": 1.0, "f": 0.0, "u": None}
SPELLED = {  # "question|first success|other successes|summaries|failures|feedback"
    "layout": "{question}|{success}|{another}|{summaries}|{failure}|{feedback}",
    "success": "{text}",
    "another": "{text};",
    "summary": "+{text};",
    "failed_summary": "-{text};",
    "failure": "{text}",
    "feedback": "{text}",
}


class Words:
    """One token per word; an answer's ids are the code points of its text."""

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(map(ord, "\n".join(f"{message['role']}: {message['content']}" for message in messages)))

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        words = text.split(" ")
        return (text, 0) if len(words) <= max_tokens else (" ".join(words[:max_tokens]), len(words) - max_tokens)

    def with_tools(self, tools: Sequence[object]) -> "Words":
        return self

    def torn(self, text: str) -> str:
        return text

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        return "".join(map(chr, answer_ids))


def group(
    verdicts: str, texts: Sequence[str] = (), feedback: Sequence[str | None] = (), problem_id: str = "p"
) -> Group:
    """ "sfu": a success, a failure and an ungraded answer, who say s0, f1 and u2 unless told otherwise."""
    says = list(texts) or [f"{verdict}{i}" for i, verdict in enumerate(verdicts)]
    heard = list(feedback) or [None] * len(verdicts)
    rollouts = tuple(
        Rollout(
            problem_id=problem_id,
            sample_id=i,
            policy_version=0,
            prompt_ids=(0,),
            answer_ids=tuple(map(ord, text)),
            answer_logprobs=None,
            answer_mask=np.ones(len(text), dtype=np.bool_),
            finish="stop",
            reward=REWARDS[verdict],
            feedback=said,
        )
        for i, (verdict, text, said) in enumerate(zip(verdicts, says, heard, strict=True))
    )
    question: Message = {"role": "user", "content": "Q"}
    return Group(problem=Problem(id=problem_id, task="math", messages=(question,)), rollouts=rollouts)


def peers(**keys: Any) -> Peers:
    """A context that spells out what it shows, in list order unless told otherwise."""
    return Peers.model_validate({"kind": "peers", "order": "published", "wording": SPELLED, **keys})


def read(context: Peers, *groups: Group, step: int = 0) -> list[Reading | None]:
    return context.read_groups(groups, Words(), (0, step, "context"))


def contents(context: Peers, *groups: Group, step: int = 0) -> list[str | None]:
    """The last turn of every reading."""
    return [reading and reading.messages[-1]["content"] for reading in read(context, *groups, step=step)]
