"""The commands around saved answers, as typed: every option reaches its place, and refusals are sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.cli.tables import evaluation_table
from opdkit.errors import UserError
from opdkit.evaluation.options import EvaluateOptions
from opdkit.measure.accuracy import Answer, accuracy
from opdkit.run.stored_answers import Store, StoredAnswer, problems_path, sentence, write_problems, write_result
from opdkit.tasks import arithmetic

PROBLEMS = arithmetic.problems("merge-3", "test", 12, 0)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two evaluations: in A every second answer is right, in B every one, and A's grader was wrong about one."""
    for name, every in (("a", 2), ("b", 1)):
        answers = [
            StoredAnswer(
                problem_id=p.id,
                sample_id=s,
                reward=float(s % every == 0 and not (name == "a" and i == s == 0)),
                parsed=p.gold,
                finish="stop",
                num_tokens=11,
                text=arithmetic.random_solution(p, s) if s % every == 0 else "\x1b[2Jwrong",
            )
            for i, p in enumerate(PROBLEMS)
            for s in range(4)
        ]
        store = Store(tmp_path / name / "set.jsonl", {"data": ["set"], "task": "arithmetic", "fingerprint": "f"})
        store.append(answers)
        write_problems(problems_path(tmp_path / name, "set"), PROBLEMS)
        write_result(tmp_path / name, {"options": {"num_samples": 4}, "eval": {"set": accuracy(answers)}})
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_compare(folders: list[str]) -> None:
    found = json.loads(run("compare", *folders, "--json"))
    assert found["sets"]["set"]["metrics"]["avg"]["after"] == 1.0
    assert "B better" in run("compare", *folders) and "A better" in run("compare", *folders[::-1])


def test_regrade(folders: list[str]) -> None:
    said = run("regrade", folders[0], "--dry-run", "--examples", "1")
    assert "1 wrong -> right" in said and "--dry-run" in said and "\x1b[2J" not in said
    assert "before_regrade_1" in run("regrade", folders[0], "--published")
    assert "nothing to write" in run("regrade", folders[0])
    with pytest.raises(UserError, match="NAME=SOURCE"):
        run("regrade", folders[0], "--data", "set")
    with pytest.raises(UserError, match="--task nonsense"):
        run("regrade", folders[0], "--task", "nonsense")


def test_diversity(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(
        "analyse", "diversity", f"first={folders[0]}", folders[1], "-n", "2", "--text-distance", "--out", str(out)
    )
    assert "success_text_distance" in said and (out / "diversity.html").exists()
    assert json.loads((out / "diversity.json").read_text())["set"]["answers_each"] == 2


def test_every_sampling_option_reaches_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each option of `Sampling`, given another value than its default, is what both commands that sample are asked."""
    words = "--limit 3 --temperature 0.5 --top-p 0.9 --top-k 7 --max-answer-tokens 9 --instruction none --seed 4 "
    words += "--dtype float32 --device cpu --chat-template plain --template enable_thinking=false --trust-remote-code"
    heard: list[EvaluateOptions] = []
    monkeypatch.setattr("opdkit.evaluation.evaluate.evaluate_model", lambda options, **_: heard.append(options) or {})
    monkeypatch.setattr("opdkit.evaluation.sample.sample", lambda options, **_: heard.append(options.model))
    question = ["--model", "m", "--data", "d", "--task", "math", "-n", "2", *words.split()]
    run("evaluate", *question)
    run("sample", *question, "--out", str(tmp_path / "out.jsonl"))
    expected = EvaluateOptions(
        model="m",
        data=("d",),
        task="math",
        num_samples=2,
        limit=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        max_answer_tokens=9,
        seed=4,
        dtype="float32",
        device="cpu",
        chat_template="plain",
        template_kwargs={"enable_thinking": False},
        instruction="none",
        trust_remote_code=True,
    )
    assert heard == [expected, expected]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give --data with --task, or --suite"),
        (("--data", "x.jsonl"), "--data needs --task"),
        (("--suite", "maths"), "choose from math, science, code, tools"),
        (("--suite", "tools", "--task", "math"), "a suite knows its own graders: leave --task out"),
        (("--suite", "tools"), "tooluse is missing.*\n.*--skip-missing"),
        (("--suite", "tools", "--skip-missing"), "no data set of the suite is there"),
        (("--data", "arithmetic:merge-3:test", "--task", "aritmetic"), "did you mean"),
        (("--data", "arithmetic:merge-3:test", "--task", "arithmetic", "--top-p", "0"), "--top-p 0 leaves no token"),
    ],
)
def test_evaluate_refuses(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    """Before a model is looked for."""
    with pytest.raises(UserError, match=f"(?s){sentence}"):
        run("evaluate", "--model", "none", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_the_sentence_says_which_problems_a_number_is_over() -> None:
    """q has one graded answer of two, so pass@2 is that of p alone, below avg@2; unsaid, that is a wrong number."""
    rewards = {("p", 0): 0.0, ("p", 1): 0.0, ("q", 0): 1.0, ("q", 1): None}
    answers = [
        Answer(problem_id=name, sample_id=s, reward=reward, parsed="7", finish="stop")
        for (name, s), reward in rewards.items()
    ]
    assert "pass@2 0.000 over the 1 with 2 graded answers, maj@2" in sentence(accuracy(answers))
    assert "over the" not in sentence(accuracy(answers[:2]))


def test_the_table_of_an_evaluation_fits_80_columns() -> None:
    """Nine data sets of long names: every number is whole, only names are folded; unknown is a dash."""
    answers = [
        StoredAnswer(
            problem_id=f"p{i}", sample_id=s, reward=float(i % 2), parsed="7", finish="length", num_tokens=31000, text=""
        )
        for i in range(20)
        for s in range(16)
    ]
    ungraded = [replace(answer, reward=None, parsed=None) for answer in answers]
    console = Console(width=80, record=True)
    console.print(evaluation_table({"HuggingFaceH4/MATH-500:test": accuracy(answers), "x": accuracy(ungraded)}))
    text = console.export_text()
    assert "…" not in text and "0.500" in text and "31000.0" in text and "320" in text and " - " in text
