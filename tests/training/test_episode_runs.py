"""Runs of episodes, trained, evaluated and resumed. The model is random and speaks digits; nothing is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.engines.hf import HFEngine
from opdkit.errors import Interrupted, UserError
from opdkit.evaluation.evaluate import sample_answers
from opdkit.metric_lines import of_steps, read_metrics
from opdkit.metrics import reduce_metrics
from opdkit.recipe import Recipe
from opdkit.reporting.episodes import read_episodes
from opdkit.rollouts.episode import Row
from opdkit.run.rows import load_rows
from opdkit.training.loop import train
from opdkit.training.models.sides import read_sides
from opdkit.training.step import train_step

TALK = '''
from opdkit.rollouts.environments.base import Grade, Step

class Talk:
    """Says a number after every turn, twice; some problems do not begin."""
    tools = ()
    def __init__(self, broken: bool = False):
        self.broken = broken
    def reset(self, problem, seed):
        if self.broken and (problem.id.endswith("closed") or int(problem.gold) % 3 == 0):
            raise RuntimeError("closed")
        self.turn = 0
        return problem.messages
    def step(self, action, seed):
        self.turn += 1
        if self.turn == 3:
            return Step(done=True, reward=0.25)
        return Step(messages=[{"role": "user", "content": str(seed % 100)}], reward=0.5 * (len(action.text) % 2))
'''


@pytest.fixture
def episodes(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    file = tmp_path / "talk.py"
    file.write_text(TALK)

    def make(method: str, *settings: str, broken: bool = False) -> Recipe:
        environment = f"{{ name = '{file}', broken = {str(broken).lower()} }}"
        limits = ("episode.max_turn_tokens=8", "episode.max_observation_tokens=6", "episode.workers=1")
        few = ("train.steps=2", "train.problems_per_step=4", "train.save_every=1", "data.limit=12", "eval.before=false")
        return recipe(method, f"episode.environment={environment}", *limits, *few, *settings)

    return make


def rows_of(recipe: Recipe) -> list[Any]:
    files = sorted((recipe.run_dir / "rows").glob("*.parquet"))
    return [row for file in files for row in load_rows(file)]


def test_a_run_of_episodes(episodes: Callable[..., Recipe], console: Any) -> None:
    chosen = episodes(
        "opd", "eval.data=arithmetic:merge-3:test", "eval.limit=3", "eval.samples=1", "eval.teacher=false"
    )
    train(chosen, console=console)
    rows = rows_of(chosen)
    assert len(rows) == 16
    seen = of_steps(read_metrics(chosen.run_dir / "metrics.jsonl"))[-1]
    assert (seen["rollout/turns"], seen["rollout/ended/done"], seen["turn/2/share"], seen["turn/2/reward"]) == (
        3,
        1,
        1,
        0.25,
    )
    assert 0 < seen["rollout/tool_share"] < 1 and seen["turn/0/teacher_kl"] > 0 and seen["turn/0/entropy"] > 0
    assert seen["rollout/max_logprob_gap"] < 1e-4 and seen["rollout/template_drift_tokens"] < 2
    assert seen["rollout/num_no_answer"] == 0  # nobody looks for one
    for row in rows:
        rollout = row.rollout
        assert len(rollout.turns) == 3 and rollout.ended == "done"
        assert rollout.reward == pytest.approx(sum(turn.reward for turn in rollout.turns))
        assert (np.isnan(rollout.answer_logprobs) == ~rollout.answer_mask).all()
        assert row.taught is not None and (row.taught.coef_ST[:, ~rollout.answer_mask] == 0).all()


def test_credit_and_environments_that_fail(episodes: Callable[..., Recipe], console: Any) -> None:
    """Problems whose environment does not begin teach nothing and stop nothing; GRPO credits turns."""
    chosen = episodes(
        "grpo", "method.credit=turn", "method.discount=0.9", "train.steps=1", "train.problems_per_step=8", broken=True
    )
    train(chosen, console=console)
    rows = rows_of(chosen)
    failed = [row.rollout for row in rows if row.rollout.ended == "failure"]
    assert failed and all(one.reward is None and not one.answer_ids for one in failed)
    summary = json.loads((chosen.run_dir / "summary.json").read_text())
    assert any("failed in an episode" in said and "closed" in said for said in summary["warnings"])
    assert any(row.taught is not None and (row.taught.coef_ST != 0).any() for row in rows)


def test_peers_are_shown_transcripts(
    episodes: Callable[..., Recipe], console: Any, tmp_path: Path, start: Callable[..., Any]
) -> None:
    """By a teacher that reads words: what a sibling said, and what it was told."""
    from opdkit.engines.scratch import bpe_tokenizer, make_model

    folder = make_model(
        tmp_path / "words", tokenizer=bpe_tokenizer(["Assistant: User: 1"], 300), hidden_size=32, num_layers=1, seed=0,
        max_positions=2048,
    )  # fmt: skip
    path = folder or tmp_path / "words"
    shown = "context={ kind = 'peers', success_threshold = 0.5 }"
    run = start(episodes("sdpo", f"model.path={path}", "sampling.group_size=4", shown))
    rows, _ = train_step(run.state, run.drawn.of_step(0))
    read = [row.view for row in rows if row.view is not None and row.view.sources]
    texts = [run.parts.renderer.tokenizer.decode(view.context_ids) for view in read]
    assert texts and all("Assistant: " in text and "\nUser: " in text for text in texts)


def test_a_resumed_run_has_the_same_bits(episodes: Callable[..., Recipe], console: Any, tmp_path: Path) -> None:
    """Stopped in the middle of the second step's episodes: the step is played again, with more workers."""
    whole, stopped = (episodes("opd", f"runs_dir={tmp_path / name}", "train.steps=3") for name in ("a", "b"))
    train(whole, console=console)
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("opdkit.rollouts.episodes._Play._tell", stop)
        with pytest.raises(Interrupted):
            train(stopped, console=console)
    assert len(rows_of(stopped)) < len(rows_of(whole))
    more = episodes("opd", f"runs_dir={tmp_path / 'b'}", "train.steps=3", "episode.workers=2")
    train(more, console=console, resume=True)
    assert [row.rollout.turns for row in rows_of(stopped)] == [row.rollout.turns for row in rows_of(whole)]
    for name in ("model", "optimizer"):
        files = [
            sorted((r.run_dir / "checkpoints/step_000003").rglob(f"{name}*.safetensors")) for r in (whole, stopped)
        ]
        assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]] and files[0]


def test_a_shifted_mask_is_caught(start: Callable[..., Any], episodes: Callable[..., Recipe]) -> None:
    """Log-probs that stand one token off, at the start of the run."""
    run = start(episodes("opd"))
    assert run.answers.prove_episodes(run.problems, 0) == []
    real = Row.say

    def shifted(row: Row, ids: Any, logprobs_T: Any, uncut_T: Any, turn: int) -> None:
        real(row, ids, np.roll(logprobs_T, 1), uncut_T, turn)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Row, "say", shifted)
        with pytest.raises(UserError, match="not scored as it was sampled"):
            run.answers.prove_episodes(run.problems, 0)
    real_score = HFEngine.score

    def score(self: HFEngine, *args: Any, **options: Any) -> Any:
        """The last row's tokens have no number."""
        *said, last = real_score(self, *args, **options)
        return [*said, replace(last, sampled_logprob_T=np.full_like(last.sampled_logprob_T, np.nan))]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HFEngine, "score", score)
        with pytest.raises(UserError, match="not scored as it was sampled"):
            run.answers.prove_episodes(run.problems, 0)


def test_rerendered_history(start: Callable[..., Any], episodes: Callable[..., Recipe], tmp_path: Path) -> None:
    """A template that shows only the last turn of the model: an episode takes several rows, every sampled token is in
    one of them, siblings count once, and the teacher reads what each row began with."""
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<a>' }}{% if loop.index0 > messages | length - 3 %}"
        "{{ m.content }}{% endif %}{{ '<e>' }}{% else %}{{ '<u>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    )
    chosen = episodes("grpo_opd", f"model.chat_template={template}", f"teacher.chat_template={template}",
                      "episode.history=rerender", "sampling.group_size=2")  # fmt: skip
    run = start(chosen)
    groups = run.answers(run.drawn.of_step(0), 0)
    num_rows = 0
    for group in groups:
        for episode in (0, 1):
            rows = [row for row in group.rollouts if row.episode_id == episode]
            assert sum(len(row.turns) for row in rows) == 3 and len({row.sample_id for row in rows}) == len(rows)
            assert len({row.reward for row in rows}) == 1 and rows[0].history == ()
            # One that wrote nothing before it stopped is shown as it was: there the row goes on.
            assert [len(row.history) // 2 for row in rows] == [int(row.turn_numbers[0]) for row in rows]
            num_rows += len(rows)
    assert num_rows > 2 * len(groups)
    played = sample_answers(
        run.problems[:2], sampler=run.answers.student_engine(0), renderer=run.parts.renderer, task=run.task.main,
        params=chosen.sampling.params, num_samples=2, seed=0, stage=run.answers.stage,
    )  # fmt: skip
    assert [answer.sample_id for answer in played] == [0, 1, 0, 1]
    rows, metrics = train_step(run.state, run.drawn.of_step(0))
    assert all(row.views["teacher"].context_ids == row.rollout.prompt_ids for row in rows)
    seen = reduce_metrics(metrics)
    rewards = {(row.problem.id, row.rollout.episode_id): row.rollout.reward for row in rows}
    assert seen["rollout/turns"] == 3 and len(rows) > len(rewards)
    assert seen["rollout/reward"] == pytest.approx(np.mean([*rewards.values()]))


def test_episodes_in_the_terminal(episodes: Callable[..., Recipe], console: Any) -> None:
    from typer.testing import CliRunner

    from opdkit.cli import app

    chosen = episodes("opd", "train.steps=1", "eval.before=false")
    train(chosen, console=console)
    rows = rows_of(chosen)

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["episodes", str(chosen.run_dir), *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    text = said()
    assert f"step 1, {rows[0].problem.id}, sample 0: reward" in text and "turn 2" in text and "ended: done" in text
    told = json.loads(said("--json", "-n", "3", "--sample", "1"))
    assert [one["sample"] for one in told] == [1, 1, 1] and [turn["turn"] for turn in told[0]["turns"]] == [0, 1, 2]
    assert told[0]["turns"][0]["messages"][0]["role"] == "user" and told[0]["turns"][2]["reward"] == 0.25
    with pytest.raises(UserError, match="has no answer of that problem and sample; its problems are"):
        read_episodes(chosen.run_dir, problem="nope")
    with pytest.raises(UserError, match="saved no rows of step 7"):
        read_episodes(chosen.run_dir, step=7)


def test_what_is_refused_before_a_weight_is_loaded(episodes: Callable[..., Recipe], tmp_path: Path) -> None:
    """A template without a turn for what the environment says, another one for the teacher, tools that no template
    offers, a teacher of other tokens."""
    silent, other = tmp_path / "silent.jinja", tmp_path / "other.jinja"
    silent.write_text(
        "{% for m in messages %}{% if loop.first or m.role == 'assistant' %}"
        "<u>{{ m.content }}<e>{% endif %}{% endfor %}"
    )
    other.write_text(
        "{% for m in messages %}<u>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    with pytest.raises(UserError, match="drops the user turn"):
        read_sides(episodes("opd", f"model.chat_template={silent}", f"teacher.chat_template={silent}"))
    with pytest.raises(UserError, match="teacher: its chat template writes other tokens between the turns"):
        read_sides(episodes("opd", f"teacher.chat_template={other}"))
    tools = tmp_path / "tools.py"
    schema = '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}'
    tools.write_text(TALK.replace("tools = ()", f"tools = [{schema}]"))
    with_tools = f"episode.environment={{ name = '{tools}' }}"
    with pytest.raises(UserError, match=r'episode.calls = "auto": the chat template .* shows no call of a tool'):
        read_sides(episodes("opd", with_tools))
    with pytest.raises(UserError, match="reads no tools, so the model would not hear of any"):
        read_sides(episodes("opd", with_tools, "episode.calls=hermes"))
    with pytest.raises(UserError, match=r"\[episode\] is what the student does"):
        episodes("sft")
    with pytest.raises(UserError, match=r"episode.max_turns = 0"):
        episodes("opd", "episode.max_turns=0")


def test_commands_play_the_episodes_of_a_recipe(episodes: Callable[..., Recipe], tmp_path: Path) -> None:
    """The same environment as in training: three turns. Of them `evaluate` stores the last, `sample` the conversation,
    whatever the environment gave; a second call samples nothing again."""
    from typer.testing import CliRunner

    from opdkit import toml
    from opdkit.cli import app

    chosen = episodes("opd")
    (tmp_path / "agent.toml").write_text(toml.dumps(chosen.as_dict()))
    asked = ["--model", chosen.model.path, "--data", "arithmetic:merge-3:test", "--task", "arithmetic", "--limit", "2"]
    few = ["-n", "1", "--max-answer-tokens", "8", "--dtype", "float32", "--device", "cpu"]
    out, how = tmp_path / "evaluated", ["--episode", str(tmp_path / "agent.toml")]
    invoke = CliRunner().invoke
    assert invoke(app, ["evaluate", *asked, *few, *how, "--out", str(out)], catch_exceptions=False).exit_code == 0
    identity, *answers = [json.loads(line) for line in next(out.glob("arithmetic*.jsonl")).read_text().splitlines()]
    assert identity["identity"]["episode"]["max_turn_tokens"] == 8 and len(answers) == 2
    assert all(answer["reward"] % 0.5 == 0.25 for answer in answers)
    file = tmp_path / "sampled.jsonl"
    told = ["sample", *asked, *few, "--reject", "none", "--out", str(file)]
    for _ in range(2):
        assert invoke(app, [*told, *how], catch_exceptions=False).exit_code == 0
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 2 and all(row["ended"] == "done" and row["reward"] % 0.5 == 0.25 for row in rows)
        assert [[said["role"] for said in row["messages"]] for row in rows] == [["user", "assistant"] * 3] * 2
    with pytest.raises(UserError, match=r"holds answers to another question: .*episode = {"):
        invoke(app, told, catch_exceptions=False)


def test_steps_in_which_no_environment_begins(start: Callable[..., Any], episodes: Callable[..., Recipe]) -> None:
    """One teaches nothing and is counted; the third in a row ends the run, and so does the first where none ever
    began."""
    run = start(episodes("opd", broken=True))
    closed = [replace(problem, id=f"{problem.id} closed") for problem in run.drawn.of_step(0)]
    with pytest.raises(UserError, match=r"could not begin one of 8 episodes: .*closed"):
        train_step(run.state, closed)
    run.answers.stage.has_begun, run.answers.stage.num_barren = True, 0
    rows, metrics = train_step(run.state, closed)
    seen = reduce_metrics(metrics)
    assert all(row.rollout.ended == "failure" for row in rows) and seen["rollout/num_ungraded"] == 8
    train_step(run.state, closed)
    with pytest.raises(UserError, match="could not begin one of 8 episodes"):
        train_step(run.state, closed)
