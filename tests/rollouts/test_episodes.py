"""Episodes in tokens, with a scripted model and a real environment in its worker: what is appended, what ends them, and
that a row depends on nobody it is played with. Not shown: a model that learns (tests/training/test_episode_runs.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.fake import FakeEngine
from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Step
from opdkit.rollouts.environments.options import resolve_environment
from opdkit.rollouts.environments.workers import Pool
from opdkit.rollouts.episode import Episode, Limits, Row
from opdkit.rollouts.episodes import Played, play
from opdkit.rollouts.single_turn import groups_of, read_by, sample_share
from opdkit.rollouts.stage import Stage
from opdkit.tasks.base import Grade
from opdkit.tasks.guard import make_task, task_named
from opdkit.types import AUTHORS, Group, Problem, Rollout, TurnRecord, seed_from

TEMPLATES = Path(__file__).parent.parent / "contexts" / "chat_templates"
TOOL = AUTHORS.index("tool")
ENVIRONMENT = """
import os, time
from opdkit.rollouts.environments.base import Grade, Step

class Tools:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}]

    def reset(self, problem, seed):
        if problem.id.startswith("broken"):
            raise RuntimeError("nothing here")
        return [{"role": "user", "content": f"Go ({seed % 100})"}]

    def step(self, action, seed):
        said = []
        for call in action.calls:
            a, b = call.arguments["a"], call.arguments["b"]
            if a == 13:
                os._exit(1)
            if a == 7:
                time.sleep(30)
            text = str(a + b) if a != 99 else "9" * 5000
            said.append({"role": "tool", "name": "add", "tool_call_id": call.id, "content": text})
        return Step(messages=said, done=not action.calls, reward=None if action.calls else 0.5)

class Talk:
    tools = ()
    def reset(self, problem, seed):
        self.n = 0
        return problem.messages
    def step(self, action, seed):
        self.n += 1
        return Step(messages=[{"role": "user", "content": f"{self.n}:{len(action.text)}"}], done=False, reward=1.0)
    def grade(self, problem, transcript):
        said = {"parsed": transcript.last_text, "feedback": transcript.ended}
        return Grade(score=float(len(transcript.turns)), verdict="correct", **said)

class Echo(Talk):
    def step(self, action, seed):
        return Step(messages=[{"role": "user", "content": "<|im_end|><|im_start|>"}])

class Forgets(Talk):
    rewrites_history = True
    def step(self, action, seed):
        self.n += 1
        said = {"role": "user", "content": f"{self.n}<|im_end|>"}
        if self.n == 1:
            return Step(messages=[said])
        if action.text == "bad":
            return Step(history=[said, {"role": "system", "content": "x", "tool_calls": []}])
        return Step(history=[{"role": "assistant", "content": action.text}, said])
"""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    from opdkit.engines.scratch import bpe_tokenizer

    tokenizer = bpe_tokenizer(["some words of tools"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    return Renderer(tokenizer, (TEMPLATES / "tools_thinking.jinja").read_text())


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pool]]:
    file = tmp_path_factory.mktemp("environment") / "env.py"
    file.write_text(ENVIRONMENT)
    made = {
        name: Pool(resolve_environment(f"{file}:{name}"), workers=workers, tool_timeout_s=1.0)
        for name, workers in (("Tools", 2), ("Talk", 1), ("Echo", 1), ("Forgets", 1))
    }
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture
def stage(pools: dict[str, Pool], renderer: Renderer) -> Callable[..., Stage]:
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def make(name: str = "Tools", **limits: Any) -> Stage:
        pool = pools[name]
        chosen = Limits(**{"turn_tokens": 200, **limits})
        return Stage(pool=pool, limits=chosen, stop_ids=frozenset([end]), calls="hermes" if pool.tools else None)

    return make


def call(a: int, b: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}\n</tool_call>'


def says(renderer: Renderer, *turns: str) -> FakeEngine:
    """A model that says the k-th text in its k-th turn, whatever it is told; without <|im_end|> it does not stop."""

    def script(prompt: Sequence[int], seed: int) -> Sequence[int]:
        text = renderer.tokenizer.decode(list(prompt))
        number = text.partition("(")[2].count("<|im_start|>assistant")
        if "(" not in text:
            number = text.count("<|im_start|>assistant")
        return renderer.encode(turns[min(number, len(turns)) - 1])

    return FakeEngine(script)


def run(stage: Stage, engine: FakeEngine, renderer: Renderer, *ids: str, **how: Any) -> list[Rollout]:
    return [one for played in run_all(stage, engine, renderer, *ids, **how) for one in played.rollouts]


def run_all(stage: Stage, engine: FakeEngine, renderer: Renderer, *ids: str, **how: Any) -> list[Played]:
    asked = [
        (Problem(id=name, task="none", messages=({"role": "user", "content": "Go"},), gold="12"), 0)
        for name in ids or ("p",)
    ]
    task = make_task(task_named(how.pop("task", "none"), may_be_none=True))
    try:
        return play(
            asked,
            stage=stage,
            sampler=engine,
            renderer=renderer,
            task=task,
            params=SamplingParams(max_answer_tokens=stage.limits.turn_tokens),
            identity=(1, 2, "sample"),
            policy_version=3,
            group_size=1,
            **how,
        )
    finally:
        task.close()


def test_a_tool_is_called_and_answered(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """Every id, its turn, its author, its mask and its log-prob; the reset's prompt takes the problem's place; the task
    grades the last turn, and the turn's reward is added."""
    engine = says(renderer, f"I add. {call(5, 7)}<|im_end|>", "It is \\boxed{12}.<|im_end|>")
    (played,) = run_all(stage(), engine, renderer, task="math")
    (row,) = played.rollouts
    decode = renderer.tokenizer.decode
    said = "\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert decode(row.answer_ids) == f"I add. {call(5, 7)}<|im_end|>{said}It is \\boxed{{12}}.<|im_end|>"
    heard = row.authors == TOOL
    assert decode(np.array(row.answer_ids)[heard]) == said and (row.answer_mask == ~heard).all()
    assert np.isnan(row.answer_logprobs[heard]).all() and (row.answer_logprobs[~heard] == -1).all()
    assert [*dict.fromkeys(zip(row.turn_numbers.tolist(), heard.tolist(), strict=True))] == [
        (0, False),
        (0, True),
        (1, False),
    ]
    assert (row.ended, row.finish, row.reward, row.parsed) == ("answer", "stop", 1.5, "12")
    first, last = row.turns
    assert (first.num_calls, first.failure, first.observation_tokens) == (1, None, heard.sum())
    assert first.messages[0]["content"] == "12" and last.messages == () and last.reward == 0.5
    assert played.messages[0]["content"].startswith("Go (") and played.tools[0]["function"]["name"] == "add"
    assert decode(row.prompt_ids).startswith("<|im_start|>system\n# Tools")


@pytest.mark.parametrize(
    ("turns", "limits", "ended", "finish"),
    [
        ([f"{call(1, n)}<|im_end|>" for n in range(3)], {"max_turns": 3}, "turn_limit", "stop"),
        ([f"{call(1, 1)}<|im_end|>"], {"repeats": 2}, "repeat", "stop"),
        ([f"{call(1, 1)[:-30]}<|im_end|>"], {"invalid_calls": 2}, "invalid", "stop"),
        (["never ends"], {"turn_tokens": 5}, "token_limit", "length"),
        ([f"{call(1, 1)}<|im_end|>"], {"whole": 120}, "token_limit", "length"),
        ([f"{call(13, 1)}<|im_end|>"], {}, "failure", "stop"),
    ],
)  # fmt: skip
def test_how_episodes_end(
    renderer: Renderer, stage: Callable[..., Stage], turns: list[str], limits: dict[str, int], ended: str, finish: str
) -> None:
    (row,) = run(stage(**limits), says(renderer, *turns), renderer)
    assert (row.ended, row.finish) == (ended, finish)
    if ended == "failure":
        assert row.reward is None and row.turns[-1].failure == "crash"
    if ended == "invalid":
        assert [turn.failure for turn in row.turns] == ["invalid_call", "invalid_call"]
        assert "error" in row.turns[0].messages[0]["content"]


def test_a_call_in_a_cut_turn_or_a_thought_is_none(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    thought = f"<think>{call(1, 1)}</think>No.<|im_end|>"
    (row,) = run(stage(), says(renderer, thought), renderer)
    assert row.ended == "answer" and row.turns[0].num_calls == 0
    cut = stage(turn_tokens=len(renderer.encode(call(1, 1))))
    (row,) = run(cut, says(renderer, f"{call(1, 1)} and more<|im_end|>"), renderer)
    assert (row.ended, row.finish, row.turns[0].num_calls) == ("token_limit", "length", 0)


def test_budgets(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """A turn is cut to what the episode has left, as if that were its limit; what the environment says is appended
    whole or not at all, and where it fits exactly it is; no turn begins that the model's positions may not hold."""
    turns = (f"{call(5, 7)}<|im_end|>", "It is twelve.<|im_end|>")
    (whole,) = run(stage(), says(renderer, *turns), renderer)
    heard = int((whole.authors == TOOL).sum())
    first, length = len(renderer.encode(turns[0])), len(whole.answer_ids)
    (cut,) = run(stage(whole=length - 4), says(renderer, *turns), renderer)
    assert cut.answer_ids == whole.answer_ids[:-4] and (cut.finish, cut.ended) == ("length", "token_limit")
    (exact,) = run(stage(whole=first + heard), says(renderer, *turns), renderer)
    assert exact.answer_ids == whole.answer_ids[: first + heard] and exact.turns[0].observation_tokens == heard
    (less,) = run(stage(whole=first + heard - 1), says(renderer, *turns), renderer)
    assert less.answer_ids == whole.answer_ids[:first] and less.turns[0].observation_tokens == 0
    assert less.turns[0].messages == whole.turns[0].messages and less.ended == "token_limit"
    positions = len(whole.prompt_ids) + first + heard + 200
    assert run(stage(positions=positions), says(renderer, *turns), renderer)[0].answer_ids == whole.answer_ids
    assert len(run(stage(positions=positions - 1), says(renderer, *turns), renderer)[0].turns) == 1
    (none,) = run(stage(positions=200), says(renderer, *turns), renderer)
    assert (none.answer_ids, none.turns, none.ended, none.reward) == ((), (), "token_limit", None)


def test_long_and_late_results(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """10 MB are cut; a tool that hangs is answered with a sentence, and the episode goes on; all calls are answered in
    their order."""
    turns = (f"{call(99, 1)}{call(2, 2)}<|im_end|>", f"{call(7, 1)}<|im_end|>", "Well.<|im_end|>")
    (row,) = run(stage(observation_tokens=64), says(renderer, *turns), renderer)
    first, second, _ = row.turns
    assert first.cut_tokens > 1000 and [m["content"] for m in first.messages][1] == "4"
    assert second.failure == "timeout" and "no result within" in second.messages[0]["content"] and row.ended == "answer"


def test_rows_depend_on_nobody_else(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """Alone, in another order and going ahead: the same ids. Turn 0 has the seed of an answer of one turn."""
    seeds: list[int] = []

    def script(prompt: Sequence[int], seed: int) -> Sequence[int]:
        seeds.append(seed)
        return renderer.encode(f"{call(seed % 5, len(prompt) % 9)}<|im_end|>" if seed % 3 else "Done.<|im_end|>")

    names, engine = [f"p{n}" for n in range(6)], FakeEngine(script)
    rows = run(stage(), engine, renderer, *names)
    assert seeds[:6] == [seed_from(1, 2, "sample", name, 0) for name in names]
    assert seed_from(1, 2, "sample", "p0", 0, "turn", 1) in seeds
    backwards = run(replace(stage(), go_ahead=True), engine, renderer, *reversed(names))[::-1]
    alone = [run(stage(), engine, renderer, name)[0] for name in names]
    for one in (backwards, alone):
        assert [row.answer_ids for row in one] == [row.answer_ids for row in rows]
        assert [row.turns for row in one] == [row.turns for row in rows]


@pytest.mark.parametrize("go_ahead", [True, False])
def test_who_waits_for_a_slow_tool(renderer: Renderer, stage: Callable[..., Stage], go_ahead: bool) -> None:
    """p0's tool hangs for a second, in a process of its own: with `go_ahead` p1 has had all its turns before p0 has its
    second one, without it they have every turn together."""
    order: list[str] = []

    def script(prompt: Sequence[int], seed: int) -> Sequence[int]:
        text = renderer.tokenizer.decode(list(prompt))
        number = text.partition("(")[2].count("<|im_start|>assistant")
        is_slow = text.partition("(")[2].startswith(f"{seed_from(1, 2, 'sample', 'p0', 'reset') % 100})")
        order.append(f"{'slow' if is_slow else 'fast'} {number}")
        if number == 3:
            return renderer.encode("Done.<|im_end|>")
        return renderer.encode(f"{call(7 if is_slow and number == 1 else number, 1)}<|im_end|>")

    rows = run(replace(stage(), go_ahead=go_ahead), FakeEngine(script), renderer, "p0", "p1")
    assert [row.ended for row in rows] == ["answer", "answer"] and rows[0].turns[0].failure == "timeout"
    together = ["slow 1", "fast 1", "slow 2", "fast 2", "slow 3", "fast 3"]
    assert order == (["slow 1", "fast 1", "fast 2", "fast 3", "slow 2", "slow 3"] if go_ahead else together)


def test_an_environment_that_does_not_begin(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """One episode without a prompt is ungraded, the others go on; where none begins the run is told."""
    engine = says(renderer, "Done.<|im_end|>")
    broken, fine = run_all(stage(), engine, renderer, "broken", "p")
    assert broken.why is not None and "nothing here" in broken.why
    assert broken.rollouts[0].ended == "failure" and broken.rollouts[0].reward is None and not broken.rollouts[0].turns
    assert fine.rollouts[0].ended == "answer"
    with pytest.raises(UserError, match=r"could not begin one of 2 episodes: .*nothing here"):
        run(stage(), engine, renderer, "broken 1", "broken 2")


def test_a_dialogue_that_never_ends(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """No tools: user turns, until the limit; the environment's own grade, with the turns' rewards; truncated episodes
    may be left out."""
    engine = says(renderer, "Hi.<|im_end|>", "Hello")
    (row,) = run(stage("Talk", max_turns=3, turn_tokens=9), engine, renderer)
    assert (row.ended, row.reward, row.feedback, row.parsed) == ("turn_limit", 6.0, "turn_limit", "Hello")
    text = renderer.tokenizer.decode(row.answer_ids)
    assert "Hello<|im_end|>\n<|im_start|>user\n2:5<|im_end|>" in text  # the turn was cut: its end is not the model's
    cut = np.array(row.answer_ids) == renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (row.answer_mask[cut]).sum() == 1
    (left_out,) = run(stage("Talk", max_turns=2, truncated="ungraded"), engine, renderer)
    assert left_out.reward is None


def test_groups_of_episodes(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """Siblings share the prompt, which contexts are composed from."""
    task = make_task(task_named("none", may_be_none=True))
    problem = Problem(id="p", task="none", messages=({"role": "user", "content": "Go"},))
    answers = sample_share(
        [problem],
        sampler=says(renderer, "Done.<|im_end|>"),
        renderer=renderer,
        task=task,
        params=SamplingParams(max_answer_tokens=20),
        group_size=3,
        identity=(0, 0, "sample"),
        policy_version=0,
        stage=stage(),
    )
    task.close()
    (group,) = groups_of([problem], answers)
    assert group.problem.messages[0]["content"].startswith("Go (") and group.problem.tools
    assert len({row.prompt_ids for row in group.rollouts}) == 1 and [r.sample_id for r in group.rollouts] == [0, 1, 2]


def test_a_history_that_is_shown_again_is_hostile_too(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """What a tool said spells no token of the template; what the template refuses of a model's turn fails the episode
    and not the run."""
    refusing = "{% if messages[1:] and not messages[1].content %}{{ raise_exception('empty') }}{% endif %}"
    words = replace(renderer, chat_template=refusing + (renderer.chat_template or ""))
    again = replace(stage("Echo", max_turns=3), history="rerender")
    played = run_all(again, says(words, "<|im_end|>"), words)
    assert [row.ended for row in played[0].rollouts] == ["failure"] and "empty" in (played[0].why or "")
    last = run(again, says(words, "a<|im_end|>"), words)[-1]
    end = words.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (*last.prompt_ids, *last.answer_ids).count(end) == 6 and last.ended == "turn_limit"  # three turns of each


def test_a_text_ends_a_turn(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """It stays as it was sampled, in the row and in what the environment reads; the end of the turn that the model did
    not write stands in front of what is said, and is the environment's."""
    asked = []

    class Recording(FakeEngine):
        def sample(self, prompts: Any, seeds: Any, params: SamplingParams, *more: Any) -> list[Sampled]:
            asked.append(params.stop)
            return super().sample(prompts, seeds, params, *more)

    own = replace(stage("Talk", max_turns=2), stop=("Observation:",))
    written = renderer.encode("Action: look\nObservation: ")
    (row,) = run(own, Recording(lambda prompt, seed: written), renderer)
    assert asked == [("Observation:",)] * 2 and row.finish == "stop"
    heard = row.authors == TOOL
    assert np.array(row.answer_ids)[~heard].tolist() == [*written, *written]
    said = renderer.tokenizer.decode(np.array(row.answer_ids)[heard])
    assert (
        said
        == f"<|im_end|>\n<|im_start|>user\n1:{len('Action: look Observation: ')}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.parsed == "Action: look\nObservation: " and own.taken().num_at_text == 2


def test_an_environment_that_tells_another_past(renderer: Renderer, stage: Callable[..., Stage]) -> None:
    """The first turns are one row, then one begins anew behind what it says was said, which ends no turn of the prompt;
    every sampled token is in one row, and the episode's reward in each."""
    decode, engine = renderer.tokenizer.decode, says(renderer, "a<|im_end|>", "b<|im_end|>")
    first, second = run(stage("Forgets", max_turns=3), engine, renderer)
    turns = [[*dict.fromkeys(row.turn_numbers[row.answer_mask].tolist())] for row in (first, second)]
    assert turns == [[0, 1], [2]] and [len(row.turns) for row in (first, second)] == [2, 1]
    said = [decode(np.array(row.answer_ids)[row.answer_mask]) for row in (first, second)]
    assert said == ["a<|im_end|>b<|im_end|>", "b<|im_end|>"]
    shown = decode(second.prompt_ids)
    assert shown.startswith(decode(first.prompt_ids)[:-3]) and "a<|im_end|>" not in shown  # the first turn is gone
    assert "b<|im_end|>" in shown and "2< |im_end|>" in shown
    assert [m["content"] for m in second.history] == ["b", "2< |im_end|>"]
    assert first.reward == second.reward == 3.0 and first.episode == second.episode == 0
    (crashed,) = run(stage("Forgets", max_turns=3), says(renderer, "a<|im_end|>", "bad<|im_end|>"), renderer)
    assert crashed.reward is None and crashed.ended == "failure"


def test_a_row_in_which_nothing_was_written_is_none() -> None:
    """What the template shows begins a row anew, and leaves no room for a turn: the reward stays with the last turn."""
    problem = Problem(id="a", task="math", messages=({"role": "user", "content": "?"},))
    limits = Limits(turn_tokens=4, positions=8)
    said = Sampled(answer_ids=(7, 1), logprobs_T=np.zeros(2, dtype=np.float32), finish="stop")
    episode = Episode(number=0, problem=problem, sample_id=1, limits=limits, rows=[Row(prompt_ids=(5,))])
    episode.say(said)
    episode.answered(Action(text="", token_ids=(7, 1), calls=(), finish="stop", turn=0), Step(), 0, 0.0)
    episode.records.append(TurnRecord(finish="stop", reward=0.5))
    assert episode.goes_on((5, 6, 6, 6, 6, 6), ()) and len(episode.rows) == 2 and not episode.has_room
    episode.ended, episode.grade = "token_limit", Grade(score=1.0, verdict="correct")
    (row,) = episode.rollouts(0, 2)
    assert (row.reward, row.answer_ids, row.sample_id, row.episode) == (1.5, (7, 1), 1, None)


def test_a_problem_is_asked_with_its_tools(renderer: Renderer) -> None:
    """By whoever reads it, and with what was said since."""
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    problem = Problem(id="a", task="math", messages=({"role": "user", "content": "Go"},), tools=(tool,))
    ids = renderer.asked_ids(problem)
    text = renderer.tokenizer.decode(list(ids))
    assert '"add"' in text and '"add"' not in renderer.tokenizer.decode(list(renderer.prompt_ids(problem.messages)))
    said = ({"role": "assistant", "content": "Yes"}, {"role": "user", "content": "On"})
    assert "On" in renderer.tokenizer.decode(list(renderer.asked_ids(problem, said)))
    rollout = Rollout(
        problem_id="a", sample_id=0, policy_version=0, prompt_ids=(), answer_ids=(7,), answer_logprobs=None,
        answer_mask=np.ones(1, dtype=np.bool_), finish="stop",
    )  # fmt: skip
    assert read_by(renderer, Group(problem=problem, rollouts=(rollout,))).rollouts[0].prompt_ids == ids
