"""What a privileged teacher reads."""

from typing import Any

from opdkit.contexts.reference_solution import BEGIN, END, ReferenceSolution
from opdkit.types import Group, Problem

CLOSING = "Put your final answer within \\boxed{}."


def read(solution: str | None, cut: Any = lambda text, limit: (text, 0), **keys: Any) -> Any:
    problem = Problem(
        id="p",
        task="math",
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"1+1?\n\n{CLOSING}"}),
        solution=solution,
        meta={"instruction": CLOSING},
    )
    return ReferenceSolution(**keys).read(Group(problem=problem, rollouts=()), None, cut)  # type: ignore[arg-type]


def test_question_then_fenced_solution_then_closing() -> None:
    """The question's own instruction closes the turn; earlier turns stay; nothing is said twice."""
    reading = read("1+1=2")
    assert [m["role"] for m in reading.messages] == ["system", "user"]
    content = reading.messages[-1]["content"]
    assert content.startswith("1+1?\n\n") and content.endswith(CLOSING) and content.count(CLOSING) == 1
    assert content.index("1+1?") < content.index(BEGIN) < content.index("1+1=2") < content.index(END)
    assert reading.num_truncated_tokens == 0


def test_only_the_solution_is_cut_and_the_cut_is_counted() -> None:
    """With a budget of 3 "tokens" (characters here): question, fences and closing are whole."""
    reading = read("123456", cut=lambda text, limit: (text[:limit], max(0, len(text) - limit)), max_solution_tokens=3)
    content = reading.messages[-1]["content"]
    assert f"{BEGIN}\n123\n{END}" in content and content.endswith(CLOSING)
    assert reading.num_truncated_tokens == 3


def test_a_problem_without_solution_gives_nothing_to_read() -> None:
    assert read(None) is None
