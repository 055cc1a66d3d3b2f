"""Each problem asks its own teacher: what it learns from, what it must not depend on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe
from opdkit.run.rows import load_rows
from opdkit.tasks import arithmetic
from opdkit.training import loop
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.problems.data import check_readable, training_data
from opdkit.training.step import train_step
from opdkit.types import Example, Problem

Start = Callable[..., TrainingRun]
Make = Callable[..., Recipe]
REDUCTIONS = ("token", "sequence", "sequence_sum")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher, of another width than the first."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    tokenizer = char_tokenizer(arithmetic.ALPHABET + "()")
    make_model(folder, tokenizer=tokenizer, hidden_size=40, num_layers=1, seed=7, max_positions=96)
    return folder


@pytest.fixture
def routed(models: dict[str, Path], narrow: Path, tmp_path: Path) -> Make:
    """Makes a recipe with two teachers, by the sections that differ."""

    def make(**sections: Any) -> Recipe:
        views = {
            name: {"teacher": {"kind": "model", "path": str(path)}}
            for name, path in (("math_teacher", models["teacher"]), ("code_teacher", narrow))
        }
        raw: dict[str, Any] = {
            "name": "run",
            "seed": 3,
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(models["student"]), "dtype": "float32", "device": "cpu"},
            "route": {"column": "domain", "views": {"math": "math_teacher", "code": "code_teacher"}},
            "views": views,
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 40},
            "sampling": {"max_answer_tokens": 16, "group_size": 2, "temperature": 1.0},
            "method": {"name": "opd"},
            "train": {"steps": 6, "problems_per_step": 4, "lr": 1e-3, "save_every": 2, "warmup_steps": 0},
            "diagnostics": {"every": 0},
        }
        for name, section in sections.items():
            merged = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
            raw[name] = merged
            if section is None:
                del raw[name]
        return parse_recipe(raw)

    return make


def of(problems: Sequence[Problem], *domains: str) -> list[Problem]:
    return [replace(p, columns={"domain": domain}) for p, domain in zip(problems, domains, strict=False)]


def learned(run: TrainingRun, problems: Sequence[Problem]) -> tuple[list[Example], dict[str, Any], Tensor]:
    """(rows, metrics, flat gradient) of a first step that is not applied."""
    seen: list[Tensor] = []
    weights, apply = run.parts.optimizer.weights, run.parts.optimizer.step

    def catch(_: int) -> StepResult:
        seen.extend(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights.values())
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    run.parts.optimizer.step = catch  # type: ignore[method-assign, assignment]
    run.state.step = 0
    rows, metrics = train_step(run.state, problems)
    run.parts.optimizer.step = apply  # type: ignore[method-assign]
    return rows, {metric.name: metric.value for metric in metrics}, torch.cat(seen).double()


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-6


@pytest.mark.parametrize("denominator", ["batch", "domain"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_domain_learns_from_its_own_teacher(
    routed: Make, start: Start, models: dict[str, Path], narrow: Path, reduction: str, denominator: str
) -> None:
    """The gradient of a mixed step is that of two runs with one teacher each, put together by their tokens or rows, or
    (a denominator per domain) by halves."""
    method = {"name": "opd", "reduction": reduction}
    run = start(routed(method=method, route={"denominator": denominator}))
    mixed = of(run.problems, "math", "code", "math", "math")
    rows, metrics, both = learned(run, mixed)
    alone, sizes = {}, {}
    for domain, path in (("math", models["teacher"]), ("code", narrow)):
        teacher = {"kind": "model", "path": str(path)}
        one = start(routed(method=method, route=None, views=None, teacher=teacher))
        own_rows, _, alone[domain] = learned(one, [p for p in mixed if p.columns["domain"] == domain])
        tokens = [len(row.rollout.answer_ids) for row in own_rows]
        sizes[domain] = sum(tokens) if reduction == "token" else len(tokens)
        read = [len(row.view.context_ids) for row in own_rows if row.view]
        assert metrics[f"views/{domain}_teacher/tokens"] == sum(read) + sum(tokens)
    shares = sizes if denominator == "batch" else {"math": 1, "code": 1}
    parts = [alone[domain] * shares[domain] for domain in alone]
    assert close(both, torch.stack(parts).sum(0) / sum(shares.values()))
    assert [row.view.by for row in rows] == [f"{row.problem.columns['domain']}_teacher" for row in rows]  # type: ignore[union-attr]
    assert metrics["teacher/tokens"] == metrics["views/math_teacher/tokens"] + metrics["views/code_teacher/tokens"]


def test_what_each_view_lost(routed: Make, start: Start) -> None:
    """`views/NAME/loss` is the mean over the tokens it read; together, weighed by tokens, they are the step's loss."""
    run = start(routed())
    rows, metrics, _ = learned(run, of(run.problems, "math", "code", "code"))
    num = {"math": 0, "code": 0}
    for row in rows:
        num[row.problem.columns["domain"]] += len(row.rollout.answer_ids)
    told = sum(metrics[f"views/{d}_teacher/loss"] * n for d, n in num.items()) / sum(num.values())
    assert told == pytest.approx(metrics["train/loss"], rel=1e-5)
    _, metrics, _ = learned(run, of(run.problems, "math"))
    assert metrics["views/code_teacher/tokens"] == 0 and metrics["views/code_teacher/loss"] is None


@pytest.mark.parametrize(
    "method",
    [
        {"name": "opd"},
        {"name": "opd", "support": "sampled"},
        {"name": "opd", "support": "teacher_topk", "k": 4, "divergence": "forward_kl"},
        {"name": "opsd"},
        {"name": "grpo_opd"},
    ],
)
@pytest.mark.parametrize("denominator", ["batch", "domain"])
def test_neither_micro_batches_nor_order_matter(
    routed: Make, start: Start, method: dict[str, Any], denominator: str
) -> None:
    """Heads of different width never share a micro-batch; the same gradient to float32 rounding."""
    run = start(routed(method=method, route={"denominator": denominator}))
    problems = of(run.problems, "math", "code", "math", "code", "code")
    _, _, whole = learned(run, problems)
    for max_tokens in (1, 60, 150):
        run.state.passes = replace(run.state.passes, max_tokens=max_tokens)
        assert close(learned(run, problems)[2], whole)
    assert close(learned(run, problems[::-1])[2], whole)


def test_a_model_is_loaded_when_its_first_row_comes(routed: Make, start: Start, models: dict[str, Path]) -> None:
    """And once, though two domains share it; which ids all know is settled before."""
    route = {"views": {"math": "math_teacher", "code": "code_teacher", "proofs": "proof_teacher"}}
    proofs = {"proof_teacher": {"teacher": {"kind": "model", "path": str(models["teacher"])}}}
    plain = routed()
    views = {name: view.model_dump(mode="json", exclude_none=True) for name, view in plain.views.items()}
    run = start(routed(route=route, views={**views, **proofs}))
    teachers = {name: viewer.teacher for name, viewer in run.parts.viewers.items()}
    known = run.parts.student.num_tokens
    assert [teacher.loaded_model for teacher in teachers.values()] == [None, None, None]
    learned(run, of(run.problems, "math", "math"))
    assert teachers["code_teacher"].loaded_model is None
    assert teachers["math_teacher"].loaded_model is teachers["proof_teacher"].loaded_model is not None
    learned(run, of(run.problems, "proofs", "code"))
    loaded = [teacher.model for teacher in teachers.values()]
    assert len({id(model) for model in loaded}) == 2
    assert {model.num_tokens for model in loaded} == {known} == {run.parts.student.num_tokens}


def test_ids_are_limited_before_a_teacher_is_loaded(routed: Make, start: Start, tmp_path: Path) -> None:
    """A teacher whose vocabulary ends earlier limits the student from the first step on, loaded or not."""
    short = tmp_path / "short"
    make_model(
        short, tokenizer=char_tokenizer(arithmetic.ALPHABET), hidden_size=16, num_layers=1, seed=1, max_positions=96
    )
    views = {"code_teacher": {"teacher": {"kind": "model", "path": str(short)}}}
    run = start(routed(views={**views, "math_teacher": {"teacher": {"kind": "self", "weights": "initial"}}}))
    before = run.parts.student.num_tokens
    assert run.parts.viewers["code_teacher"].teacher.loaded_model is None
    assert before < start(routed()).parts.student.num_tokens
    learned(run, of(run.problems, "code"))
    assert run.parts.viewers["code_teacher"].teacher.model.num_tokens == before == run.parts.student.num_tokens


def test_every_problem_is_answered_by_its_own_teacher(routed: Make, start: Start) -> None:
    """A cold start: answers are the teachers', in the order of the problems, and say who wrote them."""
    run = start(routed(method={"name": "sft", "answers": "teacher"}))
    rows, _, _ = learned(run, of(run.problems, "math", "code", "math"))
    assert [row.problem.id for row in rows[::2]] == [p.id for p in run.problems[:3]]
    assert all((row.rollout.authors == 1).all() for row in rows)
    alone = start(routed(method={"name": "sft", "answers": "teacher"}))
    again, _, _ = learned(alone, of(run.problems[1:], "code"))
    assert [row.rollout.answer_ids for row in again] == [row.rollout.answer_ids for row in rows[2:4]]


SETS = [
    {"path": "arithmetic:merge-3:train", "share": 0.75, "domain": "math", "limit": 8},
    {"path": "arithmetic:merge-4:train", "share": 0.25, "domain": "code", "limit": 5},
]


def bits(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [load_rows(path) for path in sorted((folder / "rows").iterdir())]
    answers = [[(row.rollout.key, row.rollout.answer_ids, row.view.by) for row in step] for step in rows]  # type: ignore[union-attr]
    return {
        "metrics": [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines],
        "answers": answers,
    }


def test_a_resumed_run_goes_on_to_the_same_bits(
    routed: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets by shares, two teachers, an EMA among them; stopped after five steps, with a checkpoint of four."""
    ema = {"math_teacher": {"teacher": {"kind": "self", "weights": "ema", "ema_rate": 0.1}}}
    sections: dict[str, Any] = {"data": {"train": SETS, "task": "arithmetic"}}
    other = routed().views["code_teacher"].model_dump(mode="json", exclude_none=True)
    sections["views"] = {**ema, "code_teacher": other}
    whole = routed(name="whole", **sections)
    loop.train(whole, console=console)
    calls = []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("pulled out")
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", dies)
    again = routed(name="again", **sections)
    with pytest.raises(RuntimeError, match="pulled out"):
        loop.train(again, console=console)
    loop.train(again, console=console, resume=True)
    assert bits(again.run_dir) == bits(whole.run_dir)
    first = load_rows(whole.run_dir / "rows/step_000001.parquet")
    assert all(row.view and row.view.by == f"{row.problem.columns['domain']}_teacher" for row in first)
    seen = bits(whole.run_dir)["metrics"]
    assert [line["data/math/draws"] for line in seen] == [3] * 6 and [line["data/code/draws"] for line in seen] == [
        1
    ] * 6
    assert seen[-1]["data/math/epoch"] == 18 / 8 and seen[-1]["data/code/epoch"] == 6 / 5
    environment = json.loads((whole.run_dir / "environment.json").read_text())
    assert {"data.train math", "data.train code"} <= set(environment["data"])


def test_sets_of_two_graders_are_graded_side_by_side(routed: Make, start: Start, tmp_path: Path) -> None:
    """Each answer by the grader of its set; the counts are of all answers together."""
    (tmp_path / "own.py").write_text("from opdkit.tasks import Grade\n\ndef longest(problem, text):\n    return 0.25\n")
    task = f"{tmp_path / 'own.py'}:longest"
    sets = [SETS[0], {**SETS[1], "task": task, "path": "arithmetic:merge-4:train"}]
    run = start(routed(data={"train": sets, "task": "arithmetic"}))
    rows, metrics, _ = learned(run, run.drawn.of_step(0))
    metrics |= {metric.name: metric.value for metric in run.task.drain()}
    for row in rows:
        assert (row.rollout.reward == 0.25) == (row.problem.columns["domain"] == "code")
    assert metrics["grading/accuracy"] == pytest.approx(sum(row.rollout.reward or 0 for row in rows) / len(rows))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"route": {"views": {"math": "maths_teacher", "code": "code_teacher"}}}, 'did you mean "math_teacher"?'),
        ({"route": {"views": {"math": "math_teacher"}}}, "[views.code_teacher] is not used by"),
        ({"route": {"views": {}}}, "route.views = {}"),
        ({"route": {"colum": "x"}}, "route.colum is not a key"),
        ({"teacher": {"kind": "self", "weights": "initial"}}, "remove [teacher], or [route]"),
        ({"context": {"kind": "reference_solution"}}, "[views.math_teacher.context]"),
        ({"method": {"name": "grpo"}}, "[route] chooses who the teacher is, but"),
        (
            {"route": {"denominator": "domain"}, "method": {"reduction": "sum"}},
            'method.reduction = "sum" divides by no',
        ),
        ({"data": {"train": [{**SETS[0], "share": 0.5}, SETS[1]]}}, "the shares sum to 0.75, not to 1"),
        ({"data": {"train": [SETS[0], {**SETS[1], "domain": "math"}]}}, 'the domain "math" is there twice'),
        ({"data": {"train": []}}, "give a path, or a list of sets"),
        ({"data": {"train": [{"path": "a.jsonl", "share": 1.0}]}}, "0.domain is missing"),
        ({"data": {"train": [SETS[0], {**SETS[1], "task": "tool_us"}]}}, 'did you mean "tool_use"?'),
        (
            {"data": {"train": [SETS[0], {**SETS[1], "task": {"name": "math", "cpu_s": 9.0}}], "task": "math"}},
            "two sets are graded by math with other options",
        ),
    ],
)
def test_what_a_recipe_cannot_ask(routed: Make, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        routed(**sections)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"domain": "physics"},
            "problem p has domain = 'physics', for which [route.views] names no view (domains: math",
        ),
        ({}, 'problem p has no column "domain"'),
        ({"domain": " "}, 'problem p has no column "domain"'),
    ],
)
def test_a_problem_that_nobody_can_read_is_named(routed: Make, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    """Before a model is loaded."""
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "prompt": "1+1=", "answer": "2", "domain": "math"}, {"id": "p", "prompt": "2+2=", **row}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = routed(data={"train": str(path), "task": "none"})
    with pytest.raises(UserError) as refused:
        check_readable(recipe, training_data(recipe, None))
    assert words in str(refused.value)


def test_a_set_of_too_few_problems(routed: Make, start: Start) -> None:
    with pytest.raises(UserError, match="wants 3 problems of math in a step, more than the 2"):
        start(routed(data={"train": [{**SETS[0], "limit": 2}, SETS[1]]}))


def test_the_data_says_the_domain_before_its_set_does(routed: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "1", "prompt": "1+1=", "domain": "code"}, {"id": "1", "prompt": "2+2="}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"path": str(path), "share": 0.5}
    recipe = routed(data={"train": [{**one, "domain": "math"}, {**one, "domain": "code"}], "task": "none"})
    data = training_data(recipe, None)
    assert [(p.id, p.columns["domain"]) for p in data.problems] == [
        ("1", "code"),
        ("1#2", "math"),
        ("1#3", "code"),
        ("1#2#2", "code"),
    ]
    assert data.num_duplicate_ids == 4


def test_a_schedule_changes_what_a_routed_teacher_reads(routed: Make, start: Start) -> None:
    """The numbers of its context, and how long answers may be, from the step on that the schedule says."""
    context = {"kind": "text", "text": "12345", "layout": "({text}){question}", "max_tokens": 4}
    views = {name: v.model_dump(mode="json", exclude_none=True) for name, v in routed().views.items()}
    views["math_teacher"] = {**views["math_teacher"], "context": context}
    schedule = {
        "views": {"math_teacher": {"context": {"max_tokens": [[0.5, 2]]}}},
        "sampling": {"max_answer_tokens": {"points": [[0.0, 2], [1.0, 8]], "shape": "linear"}},
    }
    run = start(routed(views=views, schedule=schedule, sampling={"max_answer_tokens": 2}))
    problems, lengths, longest = of(run.problems, "math", "code"), [], []
    for step in (0, 3, 5):
        run.state.step = step
        run.stages.enter(run.state, run.answers)
        rows, metrics = train_step(run.state, problems)
        lengths.append([len(row.view.context_ids) - len(row.rollout.prompt_ids) for row in rows])  # type: ignore[union-attr]
        longest.append(max(len(row.rollout.answer_ids) for row in rows))
        told = {metric.name: metric.value for metric in metrics}
        assert told["views/math_teacher/context/share_text"] == 1.0
    assert lengths == [[6, 6, 0, 0], [4, 4, 0, 0], [4, 4, 0, 0]]
    assert longest[0] <= 2 and longest[1] <= 5 and longest[2] <= 7 and run.recipe.longest_answer == 8
