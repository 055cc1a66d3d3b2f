"""What the model wrote, apart from what was said to it: what a grader reads, and what peers are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opdkit.contexts.peers import Peers
from opdkit.contexts.render import Renderer
from opdkit.contexts.transcript import check_one_turn, last_turn, model_turns, whole_episodes
from opdkit.errors import UserError
from opdkit.rollouts.single_turn import grade
from opdkit.tasks.guard import make_task, task_named
from opdkit.types import AUTHORS, Group, Problem, Rollout, TurnRecord

PROBLEM = Problem(id="p", task="math", messages=({"role": "user", "content": "17*23?"},), gold="391")
TOOL = AUTHORS.index("tool")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    from opdkit.engines.scratch import bpe_tokenizer

    tokenizer = bpe_tokenizer(["some words"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.add_tokens(["</result>"])
    return Renderer(tokenizer, "plain")


def episode(renderer: Renderer, *parts: tuple[str, str], **rest: Any) -> Rollout:
    """parts: (who, text), in order."""
    ids: list[int] = []
    turn, author, number = [], [], -1
    records: list[TurnRecord] = []
    for who, text in parts:
        number += who == "model"
        own = renderer.encode(text)
        ids += own
        turn += [number] * len(own)
        author += [0 if who == "model" else TOOL] * len(own)
        if who == "model":
            records.append(TurnRecord(finish="stop"))
        else:
            said = {"role": "tool", "name": "calculator", "content": text}
            records[-1] = replace(records[-1], messages=(*records[-1].messages, said))
    return Rollout(
        problem_id="p",
        sample_id=rest.pop("sample_id", 0),
        policy_version=0,
        prompt_ids=(1,),
        answer_ids=tuple(ids),
        answer_logprobs=None,
        answer_mask=np.array(author) != TOOL,
        finish="stop",
        turn=np.array(turn, dtype=np.int16),
        author=np.array(author, dtype=np.uint8),
        turns=tuple(records),
        **rest,
    )


HOLE = (("model", "I ask."), ("tool", "\\boxed{391}"), ("model", "I do not know."))


def test_a_tool_earns_no_reward(renderer: Renderer) -> None:
    """A tool that prints the right answer, for a model that does not know: the last turn is graded. So it is where
    only a mask says who wrote what."""
    task = make_task(task_named("math"))
    bare = replace(episode(renderer, *HOLE), turn=None, author=None, turns=())
    says = episode(renderer, *HOLE[:2], ("model", "It is \\boxed{391}."))
    last_word = episode(renderer, ("model", "\\boxed{391}"), ("tool", "no more turns"))
    try:
        graded = grade([PROBLEM] * 4, [episode(renderer, *HOLE), bare, says, last_word], renderer, task)
    finally:
        task.close()
    assert [one.reward for one in graded] == [0.0, 0.0, 1.0, 1.0]


def test_turns_of_the_model(renderer: Renderer) -> None:
    row = episode(renderer, *HOLE)
    assert [renderer.answer_text(ids) for ids in model_turns(row)] == ["I ask.", "I do not know."]
    assert renderer.answer_text(last_turn(row)) == "I do not know."
    single = replace(row, turn=None, author=None, turns=(), answer_mask=np.ones(len(row.answer_ids), dtype=np.bool_))
    assert model_turns(single) == [row.answer_ids]
    nothing = replace(row, turn=None, author=None, answer_ids=(), answer_mask=np.ones(0, dtype=np.bool_))
    assert last_turn(nothing) == ()


def test_peers_are_transcripts(renderer: Renderer) -> None:
    """With who said what, thoughts taken out of every turn, long results cut and counted, control strings torn."""
    peer = episode(
        renderer,
        ("model", "<think>one</think>I ask."),
        ("tool", "391</result><|end|>"),
        ("model", "<think>two</think>It is 391."),
        sample_id=1,
        reward=1.0,
    )
    long = episode(renderer, ("model", "Ask."), ("tool", "0" * 400), ("model", "Yes."), sample_id=2, reward=0.0)
    own = episode(renderer, ("model", "No."), sample_id=0, reward=0.0)
    group = Group(problem=PROBLEM, rollouts=(own, peer, long))
    peers = Peers(slots=("success", "failure"), feedback="never", remove_thinking="successes")
    reading = peers.read_groups([group], renderer, ("test",))[0]
    assert reading is not None
    text = reading.messages[-1]["content"]
    assert "Assistant: I ask.\nTool calculator: 391< /result>< |end|>\nAssistant: It is 391." in text
    assert "Assistant: Ask.\nTool calculator: 000" in text and "0\nAssistant: Yes." in text
    assert reading.num_truncated_tokens == len(renderer.encode("0" * 400)) - 128


def test_rows_of_one_episode(renderer: Renderer) -> None:
    """The last stands for all of them; who reads answers of one turn refuses them."""
    rows = [episode(renderer, *HOLE, sample_id=number, episode=number % 2) for number in range(4)]
    other = replace(rows[3], problem_id="q")
    assert [row.key for row in whole_episodes([*rows, other])] == [("p", 2), ("p", 3), ("q", 3)]
    with pytest.raises(UserError, match="opdkit analyse signal reads answers of one turn"):
        check_one_turn(rows, "opdkit analyse signal")
    check_one_turn([replace(row, turns=()) for row in rows], "opdkit analyse signal")
