"""Privileged context of OPSD: the teacher reads the problem together with its reference solution.

After the prompt of On-Policy Self-Distillation (arXiv:2601.18734) and PW-OPSD (arXiv:2605.21606): the solution stands
between fences, and the teacher is asked to understand it and then to derive the answer in its own words. Only the
solution is ever cut; the question and the closing instruction are not.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdkit.contexts.base import Context, Cut, Reading
from opdkit.types import Group, Rollout

BEGIN = "=== Reference Solution Begin ==="
END = "=== Reference Solution End ==="
TRANSITION = (
    "Read the reference solution above and make sure you understand why each step holds. Do not copy or paraphrase it: "
    "in your own words and with your own reasoning, derive the same final answer. Think step by step, explore "
    "different approaches, and go back when a path does not work."
)


class ReferenceSolution(Context):
    kind: Literal["reference_solution"] = "reference_solution"
    max_solution_tokens: Annotated[int, Field(gt=0)] = 8192  # a longer solution is cut at its end, and counted
    template: Literal["fenced", "prefix"] = "fenced"  # prefix: "(solution)question", for models that read characters

    @property
    def needs_solutions(self) -> bool:
        return True

    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading | None:
        problem = group.problem
        if problem.solution is None:
            return None
        solution, num_cut = cut(problem.solution, self.max_solution_tokens)
        *earlier, last = problem.messages
        # What the reader appended to the question (data.instruction) closes the teacher's turn too.
        closing = str(problem.meta.get("instruction", ""))
        question = last["content"].removesuffix(closing).rstrip() if closing else last["content"]
        if self.template == "prefix":
            content = f"({solution}){last['content']}"
        else:
            shown = f"Here is a reference solution to this problem:\n{BEGIN}\n{solution}\n{END}"
            content = "\n\n".join(part for part in (question, shown, TRANSITION, closing) if part)
        turns = (*earlier, {**last, "content": content})
        return Reading(messages=turns, num_truncated_tokens=num_cut, shown=("solution",))
