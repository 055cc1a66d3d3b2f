"""`opdkit.train` without a console: what is given beside the recipe, what comes back, and how it is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import some_rewards

import opdkit
from opdkit.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def raw(models: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(method: str = "grpo", **data: Any) -> dict[str, Any]:
        return {
            "name": "run",
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(models["student"]), "dtype": "float32", "device": "cpu"},
            "data": {"train": "arithmetic:merge-3:train", "limit": 20, **data},
            "sampling": {"group_size": 2, "max_answer_tokens": 8},
            "method": {"name": method},
            "train": {"steps": 2, "problems_per_step": 3, "lr": 1e-3},
        }

    return make


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/guides/python.md: the command that makes a model, and the stranger's ten lines."""
    from typer.testing import CliRunner

    from opdkit.cli import app

    page = (DOCS / "guides" / "python.md").read_text()
    (command,) = re.findall(r"```bash\nopdkit (.*?)\n```", page)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(code, space)
    run = space["run"]
    assert isinstance(run, opdkit.Run) and run.summary["steps"] == 5
    rows = run.rows()
    ends = rows.answer.str.removesuffix("<e>").str.strip()
    right = [end.endswith(gold) for end, gold in zip(ends, rows.gold, strict=True)]
    assert rows.reward.tolist() == [0.5 * ("=" in end) + 0.5 * ok for end, ok in zip(ends, right, strict=True)]


def test_what_comes_back(raw: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = raw(task="arithmetic")
    recipe["eval"] = {"data": "arithmetic:merge-3:test", "limit": 4, "samples": 2}
    told: list[tuple[int, Any]] = []
    run = opdkit.train(recipe, on_step=lambda step, metrics: told.append((step, metrics)), quiet=True)
    assert capsys.readouterr().out == ""
    assert [step for step, _ in told] == [1, 2] and told[1][1]["train/loss"] == run.metrics["train/loss"][2]
    assert run.summary["steps"] == 2 and run.folder.name == "run" and run.recipe["method"]["name"] == "grpo"
    assert run.row_steps == [1, 2] and (run.folder / "report.html").exists()
    rows = run.rows(1)
    assert len(rows) == 6 and (rows.step == 1).all() and rows.prompt.str.contains("=").all()
    assert [len(one) for one in rows.taught_coef.map(lambda array: array[0])] == rows.num_tokens.tolist()
    assert rows.messages[0][0]["role"] == "user" and isinstance(rows.meta[0], dict)
    assert run.metrics.index.tolist() == [1, 2], "evaluations, with lines of their own, have no rows"
    frame = run.evaluations
    assert frame.of.tolist() == ["step 0", "step 2"] and {"avg", "avg_low", "pass@2", "maj", "problems"} <= {*frame}
    assert frame.avg[1] == run.summary["eval"]["student_after"]["arithmetic:merge-3:test"]["avg_at_n"]["value"]
    model, tokenizer = run.student
    ids = tokenizer("1+2=", return_tensors="pt").input_ids
    assert model(ids).logits.shape[:2] == ids.shape and not model.training
    assert isinstance(run.metrics, pandas.DataFrame) and "opdkit.Run(" in repr(run)


def test_problems_that_are_in_memory(raw: Callable[..., dict[str, Any]]) -> None:
    """Rows as a file has them, their columns for the reward; what cannot be used is said."""
    recipe = raw()
    del recipe["data"]["train"]
    rows = [{"problem": f"{n}+1=", "level": n, "answer": str(n + 1)} for n in range(4)] + [{"answer": "1"}]
    run = opdkit.train(recipe, problems=rows, reward=some_rewards.column, quiet=True)
    assert {*run.rows().reward} <= {0.0, 1.0, 2.0, 3.0} and len({*run.rows().reward}) > 1
    assert run.rows().reward.tolist() == [float(gold) - 1 for gold in run.rows().gold]
    assert any("1 rows of python:problems cannot be used" in sentence for sentence in run.summary["warnings"])
    with pytest.raises(UserError, match=r"were given to opdkit.train"):
        opdkit.train(run.folder / "recipe.toml", resume=True)
    with pytest.raises(UserError, match=r"problems\[0\] is str; give Problems or dicts"):
        opdkit.train(recipe, problems=["1+1="], reward=some_rewards.length)
    with pytest.raises(UserError, match=r"problems is int; give a list"):
        opdkit.train(recipe, problems=5, reward=some_rewards.length)  # type: ignore[arg-type]
    sets = [{"path": "a.jsonl", "share": 0.5, "domain": "a"}, {"path": "b.jsonl", "share": 0.5, "domain": "b"}]
    with pytest.raises(UserError, match=r"no place beside a data.train of several sets"):
        opdkit.train(raw(train=sets), problems=rows, reward=some_rewards.length)


def test_columns_that_a_reward_reads_are_data(raw: Callable[..., dict[str, Any]]) -> None:
    """A resumed run refuses other values of theirs, which would be other rewards of the same answers."""
    recipe = raw()
    rows = [{"problem": f"{n}+1=", "level": n, "answer": str(n + 1)} for n in range(4)]
    opdkit.train(recipe, problems=rows, reward=some_rewards.column, quiet=True)
    recipe["train"]["steps"] = 3
    moved = [{**row, "level": 7} for row in rows]
    with pytest.raises(UserError, match=r"python:problems is not what it was"):
        opdkit.train(recipe, problems=moved, reward=some_rewards.column, resume=True, quiet=True)
    assert (
        opdkit.train(recipe, problems=rows, reward=some_rewards.column, resume=True, quiet=True).summary["steps"] == 3
    )


def test_where_a_reward_runs(raw: Callable[..., dict[str, Any]]) -> None:
    """A module's function in a process of its own and under its file's name, a closure here, which is said."""
    offset = 1.0

    def here(completions: list[str]) -> list[float]:
        return [os.getpid() * offset] * len(completions)

    run = opdkit.train(raw(), reward=some_rewards.process_of, quiet=True)
    assert not {float(os.getpid())} & {*run.rows().reward}
    assert run.recipe["data"]["task"]["name"].endswith("some_rewards.py:process_of")
    assert not any("this process" in sentence for sentence in run.summary["warnings"])
    run = opdkit.train(raw(), reward=here, quiet=True, overwrite=True)
    assert {*run.rows().reward} == {float(os.getpid())}
    assert any("here can be imported from no file" in sentence for sentence in run.summary["warnings"])
    with pytest.raises(UserError, match=r"was a function given to opdkit.train"):
        opdkit.train(run.folder / "recipe.toml", resume=True)


def test_a_resumed_run_keeps_its_reward(raw: Callable[..., dict[str, Any]]) -> None:
    """The text of a function is part of the run."""

    def made(text: str) -> Any:
        space: dict[str, Any] = {}
        exec(text, space)
        return space["f"]

    one = made("def f(completions): return [float(len(text)) for text in completions]")
    two = made("def f(completions): return [float(len(text)) + 1 for text in completions]")
    opdkit.train(raw(), reward=one, quiet=True)
    longer = {**raw(), "train": {"steps": 3, "problems_per_step": 3, "lr": 1e-3}}
    with pytest.raises(UserError, match=r"task python:f is not what it was .*\(its code changed\)"):
        opdkit.train(longer, reward=two, resume=True, quiet=True)
    assert opdkit.train(longer, reward=one, resume=True, quiet=True).summary["steps"] == 3


def test_rewards_add_up(raw: Callable[..., dict[str, Any]]) -> None:
    reward = {"right": "arithmetic", "long": (0.5, some_rewards.length)}
    run = opdkit.train(raw(), reward=reward, quiet=True)
    step = run.metrics.loc[2]
    assert step["grading/terms/long"] > 0
    assert step["rollout/reward"] == pytest.approx(step["grading/accuracy"] + 0.5 * step["grading/terms/long"])
    with pytest.raises(UserError, match=r"two of the rewards have one name"):
        opdkit.train(raw(), reward=[some_rewards.length, some_rewards.length])


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda text: 1.0, "does not take completions"),
        (lambda completions, trainer_state: [], "asks for trainer_state, which no grader sees"),
        (some_rewards.column, "asks for the column level, which the problems lack"),
        (lambda completions: [1.0], None),
        (3, "reward is int"),
        ({"a": (1.0,)}, r"the reward a = \(1.0,\): a weight goes before its reward"),
        ({"a": ("1", some_rewards.length)}, "a weight goes before its reward"),
        ({"a": (some_rewards.length, 0.5)}, "a weight goes before its reward"),
        ([(0.5, some_rewards.length)], "a list of rewards has no weights"),
        ("maths", "did you mean"),
    ],
)
def test_rewards_that_cannot_be(raw: Callable[..., dict[str, Any]], reward: Any, sentence: str | None) -> None:
    """Refused before a model is loaded, or by the try-out on an empty answer; one answer, one number is right there."""
    if sentence is None:
        run = opdkit.train(raw(), reward=reward, quiet=True)
        assert run.summary["counts"]["ungraded_answers"] == 0, "asked again one by one, it has as many numbers"
        return
    with pytest.raises(UserError, match=sentence):
        opdkit.train(raw(), reward=reward, quiet=True)


def test_on_step_may_end_the_run(raw: Callable[..., dict[str, Any]]) -> None:
    """The step is saved, the exception is the caller's own, and the run goes on from there."""

    def stop(step: int, metrics: Any) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match=r"enough"):
        opdkit.train(raw(task="arithmetic"), on_step=stop, quiet=True)
    steps: list[int] = []
    run = opdkit.train(raw(task="arithmetic"), on_step=lambda step, _: steps.append(step), resume=True, quiet=True)
    assert steps == [2] and run.summary["steps"] == 2


def test_ctrl_c_is_a_keyboard_interrupt(raw: Callable[..., dict[str, Any]]) -> None:
    """`except Exception` around a loop of runs does not swallow it; the signal handlers are the caller's again."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"go on with the same call and resume=True"):
        opdkit.train(raw(task="arithmetic"), on_step=lambda step, _: os.kill(os.getpid(), signal.SIGINT), quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert opdkit.train(raw(task="arithmetic"), resume=True, quiet=True).summary["steps"] == 2


def test_beside_the_main_thread(raw: Callable[..., dict[str, Any]]) -> None:
    """As some notebooks run cells: signals are somebody else's."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(opdkit.train(raw(task="arithmetic"), quiet=True)))
    thread.start()
    thread.join()
    assert found[0].summary["steps"] == 2


def test_a_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn in place through IPython, whose stand-in keeps what it is shown. Not that a browser draws it well."""
    from rich.console import Console

    from opdkit.run.console import Bar

    shown: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(html)

    display = type(sys)("IPython.display")
    display.HTML, display.display = str, lambda html, display_id: Handle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", type(sys)("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with Bar(Console(force_jupyter=True), "<run>", 3) as bar:
        bar.activity(1, 2)
        for done in (1, 2, 3):
            bar.update(done, note="loss 1")
    assert 'value="3" max="3"' in shown[-1] and "&lt;run&gt;" in shown[-1] and "loss 1" in shown[-1]


def test_what_is_no_run(tmp_path: Path) -> None:
    for call in (lambda: opdkit.Run(tmp_path), lambda: opdkit.report([])):
        with pytest.raises(UserError, match=r"is not a run folder|was given no run"):
            call()
    (tmp_path / "recipe.toml").write_text("")
    run = opdkit.Run(tmp_path)
    assert run.metrics.empty and run.evaluations.empty and run.row_steps == []
    for wanted in ("summary", "student"):
        with pytest.raises(UserError):
            getattr(run, wanted)
    with pytest.raises(UserError, match=r"has no rows"):
        run.rows()


def test_the_other_commands(models: dict[str, Path], tmp_path: Path) -> None:
    """Twice each: a second call goes on, with nothing left to do."""
    model, source = models["student"], "arithmetic:merge-3:test"
    short = {"limit": 3, "max_answer_tokens": 8, "dtype": "float32", "device": "cpu", "quiet": True}
    for _ in range(2):
        numbers = opdkit.evaluate(model, source, "arithmetic", n=2, out=tmp_path / "e", **short)
        assert numbers[source]["problems"] == 3
        counts = opdkit.sample(model, source, "arithmetic", tmp_path / "s.jsonl", reject="none", **short)
        assert counts["kept"] == 3
    with pytest.raises(UserError, match=r'no option of opdkit.evaluate .*did you mean "temperature"'):
        opdkit.evaluate(model, source, "arithmetic", temperatur=1.0)
    for wrong in ({"n": "2"}, {"n": 0}, {"limit": "3"}, {"temperature": "hot"}, {"stop_tokens": 3}):
        with pytest.raises(UserError):
            opdkit.evaluate(model, source, "arithmetic", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"attempts = '2'"):
        opdkit.sample(model, source, "arithmetic", tmp_path / "s.jsonl", attempts="2")  # type: ignore[arg-type]
    for no_run in (None, 5, [5]):
        with pytest.raises(UserError, match=r"is no run"):
            opdkit.report(no_run)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"samples = '2'"):
        opdkit.fit({}, samples="2")
    with pytest.raises(UserError, match=r"no option of opdkit.fit"):
        opdkit.fit({}, problem=3)
