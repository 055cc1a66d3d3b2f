"""Where the answers of an analysis come from: ids as they were sampled, or text read back; what is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.analysis.signal.answers import complete, find_answers, limited, usable_groups
from opdkit.analysis.signal.parts import write_part
from opdkit.contexts.render import Renderer
from opdkit.engines.hf import HFEngine
from opdkit.errors import UserError
from opdkit.evaluation.evaluate import evaluate_model
from opdkit.evaluation.options import EvaluateOptions
from opdkit.evaluation.sample import SampleOptions, sample
from opdkit.types import seed_from


@pytest.fixture(scope="module")
def renderer(models: dict[str, Path]) -> Renderer:
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(models["teacher"]))


@pytest.fixture
def asked(models: dict[str, Path]) -> EvaluateOptions:
    return EvaluateOptions(
        model=str(models["student"]),
        data=("arithmetic:merge-2:train",),
        task="arithmetic",
        num_samples=4,
        limit=6,
        max_answer_tokens=10,
        dtype="float32",
        device="cpu",
    )


def stops(renderer: Renderer) -> list[int]:
    return [renderer.tokenizer.eos_token_id, renderer.tokenizer.pad_token_id]


def test_answers_of_evaluate_are_read_back(
    asked: EvaluateOptions, renderer: Renderer, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and stop token give the ids that were sampled, but for special tokens in an answer, which a text has not;
    where those are lost the length differs, and it is counted. A character tokenizer: proves nothing about merges."""
    sampled: dict[int, Any] = {}  # by the seed, since answers are written as they end
    inner = HFEngine.sample

    def heard(self: HFEngine, prompts: Any, seeds: Any, *args: Any, **keys: Any) -> Any:
        found = inner(self, prompts, seeds, *args, **keys)
        sampled.update(zip(seeds, found, strict=True))
        return found

    monkeypatch.setattr(HFEngine, "sample", heard)
    evaluate_model(asked, out=tmp_path, console=console)
    found = find_answers(tmp_path)
    lines, counts = complete(found, renderer, stops(renderer))
    assert len(lines) == len(sampled) == counts["answers_read_back_from_text"] == 24
    special = set(renderer.tokenizer.all_special_ids)
    num_lost = 0
    for line in lines:
        answer = sampled[seed_from(asked.seed, "evaluate", line["problem_id"], line["sample_id"])]
        lost = bool(special & set(answer.answer_ids[: -1 if answer.finish == "stop" else None]))
        num_lost += lost
        if not lost and answer.answer_ids[-1] != renderer.tokenizer.pad_token_id:
            assert line["answer_ids"] == list(answer.answer_ids)
    assert counts["answers_read_back_to_another_length"] == num_lost > 0
    assert found.template is not None and found.template.template_kwargs == {}
    groups, _ = usable_groups(lines)
    assert len(groups) == 6 and groups[0].problem.messages[0]["content"].endswith("=")


def test_answers_of_sample_are_graded_again(
    asked: EvaluateOptions, renderer: Renderer, tmp_path: Path, console: Console
) -> None:
    """Kept and rejected attempts alike are answers, with the grader's reward."""
    out = tmp_path / "answers.jsonl"
    sample(SampleOptions(model=asked, reject=("truncated",), attempts=3), out=out, console=console)
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    rejected = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejected.jsonl").read_text().splitlines()[1:]]
    lines, _ = complete(find_answers(out), renderer, stops(renderer))
    assert len(lines) == len(kept) + len(rejected) > len(kept) > 0
    assert {line["finish"] for line in lines if line["text"] in {row["solution"] for row in kept}} >= {"stop"}
    assert all(line["reward"] in (0.0, 1.0) for line in lines)
    keys = [(line["problem_id"], line["sample_id"]) for line in lines]
    assert len(set(keys)) == len(keys)


def test_rows_keep_their_ids(make_run: Callable[..., Path], renderer: Renderer, tmp_path: Path) -> None:
    """A run, its rows folder, one step: the ids of the file; from an analysis: the same lines again."""
    run = make_run(tmp_path / "run")
    whole = find_answers(run)
    assert len(whole.answers) == 66 and whole.dropped == {"answers_of_older_policies": 6}
    assert find_answers(run / "rows").answers == whole.answers
    step = find_answers(run / "rows" / "step_000000.parquet")
    assert len(step.answers) == 36 and not step.dropped["answers_of_older_policies"]
    assert step.context == whole.context and step.vocabulary == whole.vocabulary is not None
    lines, counts = complete(whole, renderer, stops(renderer))
    header = {
        "identity": {"rollouts": "rows"},
        "template": None,
        "context": {},
        "vocabulary": whole.vocabulary,
        "counts": dict(counts),
    }
    write_part(tmp_path / "rollouts.jsonl", header, lines)
    again, counts_again = complete(find_answers(tmp_path), renderer, stops(renderer))
    assert again == lines and counts_again["answers_of_older_policies"] == 6


def test_a_limit_draws_problems(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Whole problems; a smaller limit takes some of the same, another seed takes others."""
    found = find_answers(make_run(tmp_path / "run"))
    chosen = {
        (limit, seed): {problem.id for problem, _ in limited(found, limit, seed).answers}
        for limit, seed in ((3, 0), (5, 0), (5, 1), (None, 0))
    }
    assert [len(ids) for ids in chosen.values()] == [3, 5, 5, 11]
    assert chosen[3, 0] < chosen[5, 0] != chosen[5, 1]
    assert len(limited(found, 3, 0).answers) == 18


def test_what_cannot_be_ranked_is_counted(make_run: Callable[..., Path], renderer: Renderer, tmp_path: Path) -> None:
    """An ungraded answer, one without a token of the model's own, a problem that is left with one answer."""
    lines, _ = complete(find_answers(make_run(tmp_path / "run")), renderer, stops(renderer))
    first = [line for line in lines if line["problem_id"] == lines[0]["problem_id"]]
    rest = [line for line in lines if line["problem_id"] != lines[0]["problem_id"]]
    broken = [
        {**first[0], "reward": None},
        {**first[1], "not_written": list(range(len(first[1]["answer_ids"])))},
        first[2],
    ]
    groups, counts = usable_groups([*broken, *rest])
    assert counts == {"ungraded_answers": 1, "empty_answers": 1, "problems_with_one_answer": 1}
    assert len(groups) == 10
    with pytest.raises(UserError, match="no problem has two graded answers among the 3"):
        usable_groups(broken)


def test_refusals(make_run: Callable[..., Path], renderer: Renderer, tmp_path: Path) -> None:
    """Nothing there, an empty file, a file of something else, a damaged step, ids of another family."""
    run = make_run(tmp_path / "run")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "prose.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bare" / "rows").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    for name, sentence in (
        ("missing", "there is no such file or folder"),
        ("empty.jsonl", "is not a file of answers"),
        ("prose.jsonl", "is not a file of answers"),
        ("bare", "holds no saved rows; set train.save_rows_every"),
        ("nothing", "holds no saved answers"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_answers(tmp_path / name)
    found = find_answers(run)
    found.answers[0][1]["answer_ids"][0] = 999
    with pytest.raises(UserError, match="has token id 999, but the model's tokenizer knows"):
        complete(found, renderer, stops(renderer))
    step = run / "rows" / "step_000000.parquet"
    step.write_bytes(step.read_bytes()[:500])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        find_answers(run)
