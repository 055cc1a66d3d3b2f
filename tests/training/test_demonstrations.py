"""Lessons that teach reading demonstrations, and the model that is made from them."""

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.contexts import Peers, build_views
from opdkit.contexts.render import Renderer
from opdkit.errors import UserError
from opdkit.tasks import arithmetic
from opdkit.training.problems.demonstrations import MARKS, MIX, WORDING, demonstration_lessons
from opdkit.types import Group, Problem, Rollout

WORLDS = ("add-3", "merge-4")


def parts(lesson: Problem) -> tuple[list[str], list[str], str]:
    """What a lesson's text shows as right, what as wrong, and the question."""
    text = lesson.messages[-1]["content"]
    return re.findall(r"\((.*?)\)", text), re.findall(r"\[(.*?)\]", text), re.sub(r"\(.*?\)|\[.*?\]", "", text)


@pytest.mark.parametrize("world", WORLDS)
def test_what_stands_in_brackets_is_what_the_brackets_say(world: str) -> None:
    """Round brackets hold answers graded right, square ones answers graded wrong, and the lesson is a right answer to
    the question behind them. Graded by the world's own grader, not by how the texts were made."""
    task = arithmetic.ArithmeticTask()
    for lesson in demonstration_lessons(f"arithmetic:{world}:train", num=64, pool=8, seed=3):
        right, wrong, question = parts(lesson)
        assert question == lesson.meta["question"]
        assert lesson.solution is not None
        verdicts = [grade.verdict for grade in task.grade([(lesson, text) for text in (*right, *wrong)])]
        assert verdicts == ["correct"] * len(right) + ["wrong"] * len(wrong)
        assert task.grade([(lesson, lesson.solution)])[0].verdict == "correct"


def test_lessons_are_mixed_as_asked_and_only_copying_sees_new_problems() -> None:
    """Shares are those of the mix; lessons without a right answer stay in the pool, the others leave it; ids differ."""
    size = sum(MIX.values())
    lessons = demonstration_lessons("arithmetic:add-3:train", num=4 * size, pool=8, seed=0)
    shown = Counter(("success",) * len(right) + ("failure",) * len(wrong) for right, wrong, _ in map(parts, lessons))
    assert shown == {kinds: 4 * times for kinds, times in MIX.items()}
    pool = {
        parts(lesson)[2]
        for lesson in demonstration_lessons("arithmetic:add-3:train", num=8, pool=8, seed=0, mix={(): 1})
    }
    questions = [(bool(right), question) for right, _, question in map(parts, lessons)]
    assert {question for copies, question in questions if not copies} == pool
    fresh = [question for copies, question in questions if copies]
    assert len(set(fresh)) == len(fresh) and not pool & set(fresh)
    assert len({lesson.id for lesson in lessons}) == len(lessons)
    again = demonstration_lessons("arithmetic:add-3:train", num=4 * size, pool=8, seed=0)
    assert again == lessons


@pytest.mark.parametrize("world", WORLDS)
def test_wrong_solutions_are_wrong_and_vary(world: str) -> None:
    """Every one parses as an answer and is graded wrong; the same seed gives the same one."""
    for problem in arithmetic.problems(world, "train", 20, 0):
        attempts = [arithmetic.wrong_solution(problem, seed) for seed in range(10)]
        assert {grade.verdict for grade in arithmetic.ArithmeticTask().grade([(problem, a) for a in attempts])} == {
            "wrong"
        }
        assert len(set(attempts)) > 5
        assert arithmetic.wrong_solution(problem, 3) == attempts[3]


def test_a_slip_is_followed_through() -> None:
    """By hand: 066+784 with 1 too many in the tens, 15 -> 16, writes 16 and, unlike a changed digit, the sum 0860."""
    assert arithmetic._add_solution("066+784=") == "6+4+0=10,6+8+1=15,0+7+1=08:0850"
    assert arithmetic._add_solution("066+784=", {1: 1}) == "6+4+0=10,6+8+1=16,0+7+1=08:0860"
    assert arithmetic._add_solution("066+784=", {1: -5}) == "6+4+0=10,6+8+1=10,0+7+1=08:0800"


def test_a_recipes_peers_are_shown_as_the_lessons_show_them(tmp_path: Path) -> None:
    """With `WORDING`, what MOPD's teacher reads is, id for id, the prompt of a lesson with the same demonstrations."""
    from opdkit.engines.scratch import char_tokenizer

    renderer = Renderer(char_tokenizer(arithmetic.ALPHABET + MARKS))
    (problem,) = arithmetic.problems("add-3", "train", 1, 0)
    right, wrong = arithmetic.random_solution(problem, 0), arithmetic.wrong_solution(problem, 0)
    answers = (right, right, right, wrong, wrong)
    rollouts = tuple(_rollout(problem, number, renderer, text) for number, text in enumerate(answers))
    peers = Peers(wording=WORDING, feedback="never", max_tokens_per_peer=64)
    views = build_views([Group(problem=problem, rollouts=rollouts)], peers, renderer, identity=(0,))
    for view, own in zip(views, rollouts, strict=True):
        assert view is not None
        shown = {number: answers[number] for _, number in view.sources}
        assert own.sample_id not in shown
        text = f"({right})({right})[{wrong}]{problem.meta['question']}"
        assert view.context_ids == renderer.prompt_ids([{"role": "user", "content": text}])


def _rollout(problem: Problem, number: int, renderer: Renderer, text: str) -> Rollout:
    import numpy as np

    ids = renderer.encode(text)
    reward = arithmetic.ArithmeticTask().grade([(problem, text)])[0].score
    return Rollout(
        problem_id=problem.id,
        sample_id=number,
        policy_version=0,
        prompt_ids=(),
        answer_ids=ids,
        answer_logprobs=None,
        answer_mask=np.ones(len(ids), dtype=np.bool_),
        finish="stop",
        reward=reward,
    )


def test_the_model_that_is_made_knows_the_marks_and_has_room(tmp_path: Path) -> None:
    """Two steps of lessons: the tokenizer reads three demonstrations of the longest world, and they fit."""
    from transformers import AutoTokenizer

    out = tmp_path / "reader"
    _make(out, steps=2, data="arithmetic:add-3:train", limit=16)
    tokenizer = AutoTokenizer.from_pretrained(out)
    (problem,) = arithmetic.problems("add-6", "train", 1, 0)
    shown = f"({problem.solution})({problem.solution})[{problem.solution}]{problem.meta['question']}"
    ids = Renderer(tokenizer).prompt_ids([{"role": "user", "content": shown}])
    assert len(ids) + 80 < tokenizer.model_max_length


def test_reading_is_taught_in_a_world_only(tmp_path: Path) -> None:
    """Refusals: other data, and a world that does not exist, each in one sentence; nothing is left behind."""
    with pytest.raises(UserError, match="--reads-demonstrations needs generated problems"):
        _make(tmp_path / "m", steps=1, data="x.jsonl")
    with pytest.raises(UserError, match="unknown arithmetic variant 'add-33'"):
        _make(tmp_path / "m", steps=1, data="arithmetic:add-33:train")
    with pytest.raises(UserError, match="is incomplete"):
        _make(tmp_path / "m", steps=1, data="arithmetic:add-3")
    assert not list(tmp_path.iterdir())


def _make(out: Path, *, steps: int, data: str, limit: int | None = None) -> None:
    from opdkit.training.make_model import make_model

    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 1}
    make_model(out, data=data, steps=steps, seed=0, limit=limit, reads_demonstrations=True, console=_quiet(), **sizes)


def _quiet() -> Console:
    return Console(file=io.StringIO())
