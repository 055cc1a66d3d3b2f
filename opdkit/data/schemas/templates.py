r"""How a bare question becomes chat turns, and how the bare question is found again inside a prompt.

One object, `Template`, writes the prompts of every split of a data set, so training and evaluation cannot drift apart.
`bare_question` takes the wrapping of every known template off, so that a published file can be given another one, and
two data sets with different wrappings can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from opdkit.types import Message

# What is appended to a mathematical question, after a blank line.
INSTRUCTIONS = {
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
    "answer_line": (
        "Please reason step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem."
    ),
}

# A format string that was filled in too rarely: `\boxed{{}}`, in all rows of the published DAPO-Math with a box.
UNFILLED_BOX = "\\boxed{{}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """`before + question + after` is the user's turn; `system`, if any, is a turn before it."""

    name: str
    source: str  # who writes prompts like this
    before: str = ""
    after: str = ""
    system: str | None = None
    answer_style: Literal["boxed", "answer_line"] | None = None  # what a task that knows several is told to read

    def messages(self, question: str) -> tuple[Message, ...]:
        user = {"role": "user", "content": f"{self.before}{question}{self.after}"}
        return (user,) if self.system is None else ({"role": "system", "content": self.system}, user)


class Bare(NamedTuple):
    question: str
    template: str  # the name of the template that was taken off; "none"
    was_unfilled: bool  # its instruction held a literal `\boxed{{}}`


_CHOICE_SYSTEM = (
    "\nGiven a question and four options, please select the right answer. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\nFor the answer, only output the letter corresponding "
    "to the correct option (A, B, C, or D), and nothing else. Do not restate the answer text. For example, if the "
    'answer is "A", just output:\n<answer>\nA\n</answer>\n'
)
_CODE = (
    "You are a coding expert. You will be given a coding problem, and you need to write a correct Python program that "
    "matches the specification and passes all tests. The time limit is 1 second. You may start by outlining your "
    "thought process. In the end, please provide the complete code in a code block enclosed with ``` ```.\n\n"
)
_STEP_BOXED = "Let's think step by step and output the final answer within \\boxed{}."

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="none", source="the question as it stands"),
        Template(
            name="boxed",
            source="Qwen's model cards; MOPD, OPSD and PW-OPSD evaluations",
            after=f"\n\n{INSTRUCTIONS['boxed']}",
            answer_style="boxed",
        ),
        Template(
            name="answer_line",
            source="opdkit: DAPO's instruction, put after the question",
            after=f"\n\n{INSTRUCTIONS['answer_line']}",
            answer_style="answer_line",
        ),
        Template(
            name="dapo",
            source="DAPO-Math-17k as published",
            before=(
                "Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
            ),
            after='\n\nRemember to put your answer on its own line after "Answer:".',
            answer_style="answer_line",
        ),
        Template(
            name="boxed_inline",
            source="DeepMath as published; DAPO-Math-17k-processed (Rethinking OPD), where the box was unfilled",
            after=f" {INSTRUCTIONS['boxed']}",
            answer_style="boxed",
        ),
        Template(
            name="step_boxed",
            source="MOPD's HMMT rows, verl's examples",
            after=f" {_STEP_BOXED}",
            answer_style="boxed",
        ),
        Template(
            name="opsd",
            source="training prompts of OPSD and PW-OPSD",
            before="Problem: ",
            after=f"\n\n{INSTRUCTIONS['boxed']}",
            answer_style="boxed",
        ),
        Template(
            name="four_options",
            source="SciKnowEval in SDPO and MOPD",
            after="\nPlease reason step by step.",
            system=_CHOICE_SYSTEM,
        ),
        Template(name="coding_expert", source="LiveCodeBench and EvalPlus in SDPO and MOPD", before=_CODE),
    )
}
MATH_TEMPLATES = ("boxed", "answer_line", "none", "dapo", "boxed_inline", "step_boxed", "opsd")


def bare_question(text: str) -> Bare:
    """The question without the wrapping of the template that fits, the longest first.

    Where a template fits to the letter, so does the question, and the template gives the same text again. Else white
    space between question and instruction does not matter, nor whether the box is filled in.
    """
    for template in _LONGEST_FIRST:
        if text.startswith(template.before) and text.endswith(template.after):
            question = text.removeprefix(template.before).removesuffix(template.after)
            if question.strip():
                return Bare(question, template.name, False)
    stripped = text.strip()
    for template in _LONGEST_FIRST:
        before, after = template.before.strip(), template.after.strip()
        if not stripped.startswith(before):
            continue
        inner = stripped.removeprefix(before)
        for ending in dict.fromkeys((after, after.replace("\\boxed{}", UNFILLED_BOX))):
            if inner.endswith(ending) and (question := inner.removesuffix(ending).strip()):
                return Bare(question, template.name, ending != after)
    return Bare(text, "none", False)


def spaceless(text: str) -> bytes:
    """A text without its white space: two questions for which it is the same are the same question."""
    return text.encode().translate(None, b" \t\n\r\v\f")


_LONGEST_FIRST = sorted(
    (template for template in TEMPLATES.values() if template.before or template.after),
    key=lambda template: -len(template.before.strip() + template.after.strip()),
)
