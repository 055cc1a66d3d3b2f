"""`opdkit analyse signal` end to end, with a real model: what is scored, resumed, refused, and measured again."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from opdkit.analysis.signal import scores as scores_module
from opdkit.analysis.signal.analyse import analyse_signal
from opdkit.analysis.signal.options import SignalOptions
from opdkit.analysis.signal.parts import STEPS
from opdkit.analysis.signal.sampling import SamplingOptions
from opdkit.cli import app
from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.errors import Interrupted, UserError
from opdkit.measure.ranking import METRICS
from opdkit.measure.signal import SAMPLE_SETS

Lines = list[dict[str, Any]]


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def options(models: dict[str, Path], run: Path, tmp_path: Path) -> SignalOptions:
    return SignalOptions(
        folder=tmp_path / "analysis",
        steps=STEPS,
        model=str(models["teacher"]),
        rollouts=run,
        context={},
        template_kwargs={},
        dtype="float32",
        device="cpu",
        conditions="base,1S,1F,2S1F",
    )


def test_the_whole_of_it(options: SignalOptions, console: Console) -> None:
    """Eleven problems, of which one came twice: the newer policy's answers count. All files are there and agree."""
    analyse_signal(replace(options, conditions="all"), console)
    folder = options.folder
    header, *answers = lines(folder / "rollouts.jsonl")
    assert len(answers) == 66 and header["counts"]["answers_of_older_policies"] == 6
    assert header["counts"]["answers_whose_prompt_reads_otherwise"] == 0, "the template is the one of training"
    assert {line["policy_version"] for line in answers} == {0, 1}
    header, *contexts = lines(folder / "contexts.jsonl")
    assert header["counts"]["answers_shown_and_not_scored"] == 33 and header["counts"]["answers_scored"] == 33
    assert header["identity"]["context"]["wording"]["success"] == "({text})", "the wording is the run's"
    _, *scores = lines(folder / "scores.jsonl")
    num_conditions = len({line["condition"] for line in contexts})
    assert len(scores) == 33 * num_conditions and all(line["score"] < 0 for line in scores)
    result = json.loads((folder / "metrics.json").read_text())
    assert set(result["sample_sets"]) == set(SAMPLE_SETS)
    base = result["sample_sets"]["both_present_all"]["conditions"]["base"]
    assert base["problems"] == 11 and set(base["metrics"]) == set(METRICS)
    with (folder / "metrics.csv").open() as file:
        rows = {tuple(row[key] for key in ("sample_set", "paired", "condition", "difficulty", "metric")): row["value"]
                for row in csv.DictReader(file)}  # fmt: skip
    assert float(rows["both_present_all", "0", "base", "all", "success_auc"]) == base["metrics"]["success_auc"]["value"]
    report = (folder / "report.md").read_text()
    assert "11 problems with right and wrong answers" in report and "`random_peer`" in report
    for figure in re.findall(r"\((\S+\.svg)\)", report):
        ElementTree.fromstring((folder / figure).read_text())


def test_scores_are_the_models_log_probs(options: SignalOptions, console: Console) -> None:
    """Each score is the mean log-softmax of the module's own logits behind the context's chat turns, and no padding,
    batching or sharing of equal pairs shows. float32: to 1e-5."""
    analyse_signal(options, console)
    answers = {(a["problem_id"], a["sample_id"]): a for a in lines(options.folder / "rollouts.jsonl")[1:]}
    scores = {(s["condition"], s["problem_id"], s["sample_id"]): s for s in lines(options.folder / "scores.jsonl")[1:]}
    model = LanguageModel.load(options.model or "", dtype=torch.float32, device="cpu")
    checked = 0
    for context in lines(options.folder / "contexts.jsonl")[1::3]:
        text = model.tokenizer.apply_chat_template(context["messages"], add_generation_prompt=True, tokenize=False)
        prompt = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for sample in context["sample_ids"]:
            answer = answers[context["problem_id"], sample]["answer_ids"]
            with torch.no_grad():
                logits = model.module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logprob = logits[:, : model.num_tokens].log_softmax(-1)[range(len(answer)), answer]
            found = scores[context["condition"], context["problem_id"], sample]
            assert found["score"] == pytest.approx(logprob.mean().item(), abs=1e-5)
            assert found["num_context_tokens"] == len(prompt) and found["num_tokens"] == len(answer)
            checked += 1
    assert checked > 20


def test_stopped_and_resumed_is_the_same_bits(
    options: SignalOptions, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the second batch, then a crash in the middle of a line: the scores are those of one run, and only
    batches that miss something are scored again."""
    monkeypatch.setattr(scores_module, "PAIRS_PER_BATCH", 16)
    analyse_signal(options, console)
    whole = sorted((options.folder / "scores.jsonl").read_text().splitlines())
    again = replace(options, folder=tmp_path / "again")
    asked: list[int] = []
    score = HFEngine.score

    def heard(self: HFEngine, contexts: Any, *args: Any, **keys: Any) -> Any:
        asked.append(len(contexts))
        if len(asked) == 3:
            raise Interrupted
        return score(self, contexts, *args, **keys)

    monkeypatch.setattr(HFEngine, "score", heard)
    with pytest.raises(Interrupted):
        analyse_signal(again, console)
    with pytest.raises(UserError, match=r"scores\.jsonl has \d+ of its \d+ lines.*run the same command"):
        analyse_signal(replace(again, steps=("metrics",)), console)
    path = again.folder / "scores.jsonl"
    path.write_text(path.read_text()[:-40])
    asked[:] = [0, 0, 0]
    analyse_signal(again, console)
    assert sorted(path.read_text().splitlines()) == whole
    num_pairs = len({(line["score"], line["num_context_tokens"]) for line in lines(path)[1:]})
    assert 0 < sum(asked) < num_pairs, "the first batch was not scored again"
    asked[:] = [0, 0, 0]
    analyse_signal(again, console)
    assert sum(asked) == 0, "a finished analysis scores nothing"


def test_numbers_and_figures_need_no_model(
    options: SignalOptions, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same metrics from scores.jsonl alone; other definitions are other numbers."""
    analyse_signal(options, console)
    before = (options.folder / "metrics.json").read_text()
    for name in ("metrics.json", "rollouts.jsonl", "contexts.jsonl", "report.md"):
        (options.folder / name).unlink()

    def load(*args: Any, **keys: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LanguageModel, "load", load)
    alone = replace(options, model=None, rollouts=None, steps=("metrics", "plots"))
    analyse_signal(alone, console)
    assert (options.folder / "metrics.json").read_text() == before and (options.folder / "report.md").exists()
    analyse_signal(replace(alone, definitions="published"), console)
    published = json.loads((options.folder / "metrics.json").read_text())
    scores = options.folder / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"success": true', '"success": false'))
    analyse_signal(alone, console)
    assert not (options.folder / "signal.svg").exists(), "no figure of other numbers stands beside these"
    assert published["definitions"] == "published" and published["sample_sets"] != json.loads(before)["sample_sets"]


def test_sampled_answers_are_resumed(
    options: SignalOptions, models: dict[str, Path], console: Console, tmp_path: Path
) -> None:
    """A student answers a data set. What follows fails, and the answers are kept; cut in the middle, the same come
    again; for another seed they are refused."""
    sampling = SamplingOptions(
        data="arithmetic:merge-2:train",
        task="arithmetic",
        num_samples=3,
        student=str(models["student"]),
        params=SamplingParams(max_answer_tokens=6),
        instruction="auto",
    )
    asked = replace(options, rollouts=None, sampling=sampling, limit=8, steps=("rollouts", "contexts"))
    asked = replace(asked, conditions="base,1F", context={"wording": "published"})
    with pytest.raises(UserError, match="cannot read the text"):  # a tokenizer of digits, a wording of letters
        analyse_signal(asked, console)
    path = asked.folder / "rollouts.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == 25
    path.write_text(whole[: len(whole) // 2])
    analyse_signal(replace(asked, steps=("rollouts",)), console)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(UserError, match=r"another question: .*seed = 0 \(now 1\)"):
        analyse_signal(replace(asked, seed=1, steps=("rollouts",)), console)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context": {"max_tokens_per_peeer": 9}}, 'max_tokens_per_peeer does not exist; did you mean "max_tokens_per'),
        ({"context": {"slots": ["failure"]}}, "slots is what a condition chooses"),
        ({"context": {"max_tokens_per_peer": "many"}}, "context.max_tokens_per_peer: .*valid integer"),
        ({"conditions": "2S2F"}, "--conditions 2S2F does not exist"),
        ({"conditions": "2S", "context": {"wording": {"layout": "{success}{question}"}}}, "has no {another}"),
    ],
)
def test_what_is_refused_is_refused_before_sampling(
    options: SignalOptions, console: Console, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    """No model is loaded, and nothing is written, whether answers would be sampled or taken."""

    def load(*args: Any, **keys: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LanguageModel, "load", load)
    params = SamplingParams(max_answer_tokens=6)
    data = "arithmetic:merge-2:train"
    sampling = SamplingOptions(
        data=data, task="arithmetic", num_samples=3, student=None, params=params, instruction="auto"
    )
    for source in ({"rollouts": None, "sampling": sampling}, {}):
        with pytest.raises(UserError, match=sentence):
            analyse_signal(replace(options, **source, **change), console)
    assert not options.folder.exists()


def test_copies_of_what_is_shown_are_told_apart(options: SignalOptions, console: Console) -> None:
    """An answer that says what its condition shows is a copy there, and none under `base`."""
    analyse_signal(options, console)
    texts = {(a["problem_id"], a["sample_id"]): a["text"] for a in lines(options.folder / "rollouts.jsonl")[1:]}
    shown = {(c["condition"], c["problem_id"]): {texts[tuple(source)] for source in c["sources"]}
             for c in lines(options.folder / "contexts.jsonl")[1:]}  # fmt: skip
    scores = lines(options.folder / "scores.jsonl")[1:]
    for score in scores:
        text = texts[score["problem_id"], score["sample_id"]]
        assert score["copy"] == (text in shown[score["condition"], score["problem_id"]])
    assert any(score["copy"] for score in scores) and not any(s["copy"] for s in scores if s["condition"] == "base")
    report = (options.folder / "report.md").read_text()
    assert "`solution+another_solution+failure_solution` - `solution`" in report and "without them" in report


def test_the_template_of_training_is_used(
    make_run: Callable[..., Path], options: SignalOptions, console: Console, tmp_path: Path
) -> None:
    """A run with a chat template of its own: the teacher reads through it, unless another one is asked for."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ mark }}<a>")
    model = {"path": str(options.rollouts), "chat_template": str(template), "template_kwargs": {"mark": ";"}}
    run = make_run(tmp_path / "other", model=model)
    analyse_signal(replace(options, rollouts=run, conditions="base", steps=STEPS[:3]), console)
    header = lines(options.folder / "rollouts.jsonl")[0]
    assert header["template"] == {"chat_template": template.read_text(), "template_kwargs": {"mark": ";"}}
    assert header["counts"]["answers_whose_prompt_reads_otherwise"] == 66, "the rows were made with the plain template"
    assert {line["num_context_tokens"] for line in lines(options.folder / "scores.jsonl")[1:]} == {4 + 2}
    with pytest.raises(UserError, match=r"contexts\.jsonl was made by another question: template"):
        analyse_signal(replace(options, rollouts=run, conditions="base", template_kwargs={"mark": ":"}), console)


def test_what_the_teacher_cannot_read_is_counted(
    options: SignalOptions, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions for a question and one demonstration, not for two: those scores are missing, and said to be."""
    monkeypatch.setattr(LanguageModel, "max_positions", 48, raising=False)
    init = LanguageModel.__init__

    def short(self: LanguageModel, *args: Any, **keys: Any) -> None:
        init(self, *args, **keys)
        self.max_positions = 46

    monkeypatch.setattr(LanguageModel, "__init__", short)
    analyse_signal(options, console)
    result = json.loads((options.folder / "metrics.json").read_text())
    unread = result["counts"]["scores_too_long_for_the_teacher"]
    assert unread and "base" not in unread
    scored = result["sample_sets"]["all_samples"]["conditions"]
    assert all(scored.get(name, {"answers": 0})["answers"] == 33 - count for name, count in unread.items())
    assert "too long for the teacher under" in (options.folder / "report.md").read_text()


def test_refusals(options: SignalOptions, models: dict[str, Path], run: Path, console: Console) -> None:
    """Each with the way out, and none leaves numbers behind."""
    cases = [
        ({"folder": run}, "is a run, not an analysis; give it as --rollouts"),
        ({"steps": ("metric",)}, "--steps metric is no step; choose from rollouts, contexts"),
        ({"model": None}, "the step rollouts needs the teacher: give --model"),
        ({"model": None, "steps": ("metrics", "plots")}, "--rollouts is for the steps .* give --model, or leave"),
        ({"rollouts": None}, "no answers were given: --rollouts FILE_OR_RUN"),
        ({"rollouts": run / "rwos"}, "there is no such file or folder"),
        ({"model": str(models["stranger"])}, "its tokenizer is not the one the answers were written with"),
        ({"conditions": "2S2F"}, 'does not exist; did you mean "2S1F"'),
        ({"conditions": "feedback"}, r"feedback: context: .*wording.layout has no \{feedback\}"),
        ({"context": {"slots": []}}, "slots is what a condition chooses"),
        ({"steps": ("scores",)}, r"there is no .*rollouts\.jsonl: run the step rollouts first"),
        ({"resamples": 20}, "--resamples is of the bootstrap of --definitions published"),
        ({"steps": ("metrics",)}, r"there is no .*scores\.jsonl: run the step scores first"),
        ({"steps": ("plots",)}, r"there is no .*metrics\.json: run the step metrics first"),
    ]
    for change, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            analyse_signal(replace(options, **change), console)
    analyse_signal(options, console)
    for change, sentence in (
        ({"design": "siblings"}, r"contexts\.jsonl was made by another question: design = \"fixed\" \(now"),
        ({"model": str(models["student"])}, r"scores\.jsonl was made by another question: model = "),
        ({"limit": 3}, r"rollouts\.jsonl was made by another question: limit = null \(now 3\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            analyse_signal(replace(options, **change), console)


def test_the_command_line(options: SignalOptions, run: Path, console: Console) -> None:
    """Options reach the analysis; a folder that is finished needs nothing else."""
    asked = ["--model", options.model, "--rollouts", run, "--dtype", "float32", "--device", "cpu"]
    asked += ["--conditions", "base,1S", "--context", "max_tokens_per_peer=3", "--design", "siblings"]
    command = ["analyse", "signal", str(options.folder)]
    first = CliRunner().invoke(app, [*command, *map(str, asked)], catch_exceptions=False)
    assert first.exit_code == 0 and "signal.svg" in first.output.replace("\n", "")
    header = lines(options.folder / "contexts.jsonl")[0]["identity"]
    assert header["design"] == "siblings" and header["context"]["max_tokens_per_peer"] == 3
    again = CliRunner().invoke(app, [*command, "--definitions", "published", "--resamples", "20"])
    assert again.exit_code == 0
    assert json.loads((options.folder / "metrics.json").read_text())["definitions"] == "published"
    alone = CliRunner().invoke(app, [*command, "--data", "arithmetic:merge-2:train"])
    assert isinstance(alone.exception, UserError) and "--data and --task go together" in str(alone.exception)
    nobody = CliRunner().invoke(app, [*command, "--student", "s"])
    assert isinstance(nobody.exception, UserError) and "--student answers --data" in str(nobody.exception)


def test_right_answers_of_a_biased_teacher_rank_first(
    options: SignalOptions, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that prefers right answers once it was shown a success, and wrong ones before: AUC 1 against 0."""
    right = set()

    def biased(self: HFEngine, contexts: Any, answers: Any, needs: Any, **keys: Any) -> Any:
        from opdkit.types import Signal

        mark = self.model.tokenizer("(")["input_ids"][-1]
        return [
            Signal(
                sampled_logprob_T=np.full(
                    len(a), -1.0 if (tuple(a) in right) == (mark in c) else -2.0, dtype=np.float32
                )
            )
            for c, a in zip(contexts, answers, strict=True)
        ]

    analyse_signal(replace(options, steps=("rollouts", "contexts")), console)
    right |= {tuple(a["answer_ids"]) for a in lines(options.folder / "rollouts.jsonl")[1:] if a["reward"] == 1}
    monkeypatch.setattr(HFEngine, "score", biased)
    analyse_signal(options, console)
    found = json.loads((options.folder / "metrics.json").read_text())["sample_sets"]["both_present_effective_only"]
    auc = {name: part["metrics"]["success_auc"]["value"] for name, part in found["conditions"].items()}
    assert auc["base"] == auc["failure_solution"] == 0.0
    assert auc["solution"] == auc["solution+another_solution+failure_solution"] == 1.0
    difference = found["conditions"]["solution"]["difference_to_base"]["success_auc"]
    assert (difference["value"], difference["problems"]) == (1.0, 11) and difference["low"] > 0
