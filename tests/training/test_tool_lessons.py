"""What the agent quickstart teaches its models before they meet. That a student learns is `benchmarks/agents.py`."""

from pathlib import Path

import pytest

from opdkit.contexts.render import Renderer
from opdkit.contexts.suffix import Suffixes
from opdkit.quickstart import PLAIN, _recipe
from opdkit.quickstart_agent import WHOLE_AGENT, WHOLE_ARMS
from opdkit.rollouts.tools import parse_calls
from opdkit.tasks.arithmetic import ArithmeticTask
from opdkit.training.problems.tool_lessons import TOOL, calculator_tokenizer, direct_lessons, tool_lessons
from opdkit.types import Problem

DATA = "arithmetic:multiply-2:train"
TOKENIZER = calculator_tokenizer()


def test_lessons_are_turns_of_episodes() -> None:
    """A call as the template writes it, then what the tool said; one in four behind a peer's transcript."""
    lessons = tool_lessons(DATA, num=64, seed=0)
    renderer = Renderer(TOKENIZER).with_tools(lessons[0].tools)
    calls, answers = [], []
    for place, lesson in enumerate(lessons):
        prompt = renderer.prompt_text(lesson.messages)
        assert TOKENIZER.decode(renderer.prompt_ids(lesson.messages)) == prompt and prompt.startswith(
            "<s>calculator<u>"
        )
        assert (prompt.count("Tool calculator: ") == 1) == (place % 4 == 0)
        parsed = parse_calls(lesson.solution, "hermes")
        (calls if parsed.calls else answers).append(lesson)
        if parsed.calls:
            (call,) = parsed.calls
            assert call.name == TOOL and f"{call.arguments['expression']}=" == lesson.meta["question"]
            turn = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": TOOL, "arguments": call.arguments}}],
            }
            assert renderer.prompt_text([*lesson.messages, turn]).endswith(f"<a>{lesson.solution}<e><a>")
        else:
            assert lesson.solution == lesson.gold and prompt.endswith(f"<r>{lesson.gold}<a>")
    assert len(calls) == len(answers) == 32
    for lesson in direct_lessons(DATA, num=8, seed=0):
        left, right = lesson.meta["question"].rstrip("=").split("*")
        assert lesson.solution == lesson.gold == str(int(left) * int(right))


def test_a_lesson_reads_as_the_episode_does() -> None:
    """The ids of the second turn's prompt are those of the stream: nothing is learned of other tokens."""
    call, answer = (lesson for lesson in tool_lessons(DATA, num=8, seed=0)[1:8:4])
    renderer = Renderer(TOKENIZER).with_tools(call.tools)
    question, said, result = answer.messages
    first = renderer.prompt_ids([question])
    turn = (*renderer.encode(said["content"]), TOKENIZER.eos_token_id)
    suffixes = Suffixes(renderer, frozenset([TOKENIZER.eos_token_id]))
    observation = {**result, "name": TOOL, "tool_call_id": "t0000c000"}
    stream = (*first, *turn, *suffixes.after(turn[-1], [observation]).ids)
    assert stream == renderer.prompt_ids(answer.messages)


@pytest.mark.parametrize(
    ("text", "verdict"), [("136", "correct"), ("135", "wrong"), ("It is 136", "no_answer"), ("", "no_answer")]
)
def test_products_are_graded(text: str, verdict: str) -> None:
    asked = ({"role": "user", "content": "17*08="},)
    problem = Problem(id="p", task="arithmetic", messages=asked, gold="136")
    assert ArithmeticTask().grade([(problem, text)])[0].verdict == verdict


def test_every_arm_is_an_ordinary_recipe(tmp_path: Path) -> None:
    """All but one act in episodes; the plain quickstart has none, and keeps its own arms."""
    recipes = {arm: _recipe(WHOLE_AGENT, tmp_path / "agent", 3, arm) for arm in ("", *WHOLE_ARMS)}
    assert {arm for arm, recipe in recipes.items() if recipe.episode is None} == {"no-tool"}
    assert recipes["peers"].context.kind == "peers" and recipes["grpo"].teacher.kind == "none"
    assert len({recipe.train.problems_per_step * recipe.sampling.group_size for recipe in recipes.values()}) == 1
    assert _recipe(PLAIN, tmp_path / "plain", 3, "").episode is None
