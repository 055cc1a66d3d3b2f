"""Groups written as letters, and a reader whose tokens are words: what the tests of the conditions are made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opdkit.analysis.signal.conditions import peers_of
from opdkit.contexts.peers import Peers
from opdkit.types import Group, Message, Problem, Rollout

SPELLED = {  # "Q|first success|other successes|summaries|failures|feedback"
    "layout": "{question}|{success}|{another}|{summaries}|{failure}|{feedback}",
    "success": "{text}",
    "another": "{text};",
    "summary": "+{text};",
    "failed_summary": "-{text};",
    "failure": "{text};",
    "feedback": "{text}",
}


class Words:
    """One token per word; an answer's ids are the code points of its text."""

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(map(ord, "\n".join(message["content"] for message in messages)))

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        words = text.split(" ")
        return (text, 0) if len(words) <= max_tokens else (" ".join(words[:max_tokens]), len(words) - max_tokens)

    def with_tools(self, tools: Sequence[object]) -> "Words":
        return self

    def torn(self, text: str) -> str:
        return text

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        return "".join(map(chr, answer_ids))


def group(verdicts: str, problem_id: str = "p", feedback: Sequence[str | None] = ()) -> Group:
    """ "sf": a success that says "<problem>s0" and a failure that says "<problem>f1". Digits are tenths of reward."""
    heard = list(feedback) or [None] * len(verdicts)
    rollouts = []
    for i, (verdict, said) in enumerate(zip(verdicts, heard, strict=True)):
        text = f"{problem_id}{verdict}{i}"
        rollouts.append(
            Rollout(
                problem_id=problem_id,
                sample_id=i,
                policy_version=0,
                prompt_ids=(),
                answer_ids=tuple(map(ord, text)),
                answer_logprobs=None,
                answer_mask=np.ones(len(text), dtype=np.bool_),
                finish="stop",
                reward={"s": 1.0, "f": 0.0}[verdict] if verdict in "sf" else int(verdict) / 10,
                feedback=said,
            )
        )
    question: Message = {"role": "user", "content": "Q"}
    return Group(problem=Problem(id=problem_id, task="math", messages=(question,)), rollouts=tuple(rollouts))


def spelled(**keys: Any) -> Peers:
    """Shows what there is, in list order."""
    return peers_of({"order": "published", "wording": SPELLED, **keys})
