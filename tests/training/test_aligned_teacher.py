"""Runs with a teacher that has another tokenizer: what is taught is what the definition says, and nothing is filled in.

The alignment itself: tests/engines/test_aligned.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from opdkit.engines.model import LanguageModel
from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.recipe import Recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import TrainingRun, train
from opdkit.training.metrics.describe import describe_views
from opdkit.training.spans import check_coverage, spread
from opdkit.training.step import train_step
from opdkit.types import Asked, Signal, Spans

Make = Callable[..., Recipe]
ALIGN, SAMPLED = "teacher.tokens=align", "method.support=sampled"
LISTS = ("method.support=student_topk", "method.k=4")


@pytest.fixture(scope="session")
def renumbered(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of `models` with the ids of its characters turned round: the same function of text."""
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(models["student"])
    ours = char_tokenizer(arithmetic.ALPHABET + "()")
    theirs = char_tokenizer("".join(reversed(arithmetic.ALPHABET + "()")))
    rows = torch.tensor([ours.get_vocab()[t] for t, _ in sorted(theirs.get_vocab().items(), key=lambda one: one[1])])
    with torch.no_grad():
        source.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight[rows].clone())
    folder = tmp_path_factory.mktemp("renumbered") / "model"
    source.save_pretrained(folder)
    theirs.model_max_length = 96
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with two digits to a token."""
    folder = tmp_path_factory.mktemp("pairs") / "model"
    tokenizer = char_tokenizer(arithmetic.ALPHABET + "()", digits_per_token=2)
    make_model(folder, tokenizer=tokenizer, hidden_size=48, num_layers=1, seed=1, max_positions=96)
    return folder


def stepped(run: TrainingRun, num: int = 1) -> tuple[list[Any], list[Metric], dict[str, torch.Tensor]]:
    rows: list[Any] = []
    metrics: list[Metric] = []
    for number in range(num):
        rows, metrics = train_step(run.state, run.data.problems[5 * number : 5 * number + 5])
    return rows, metrics, {name: weight.clone() for name, weight in run.parts.optimizer.weights.items()}


def weights_of(start: Any, chosen: Recipe, num: int = 2) -> dict[str, torch.Tensor]:
    return stepped(start(chosen), num)[2]


@pytest.mark.parametrize("loss", [(SAMPLED,), LISTS, ("method.support=teacher_topk", "method.k=3")], ids=["sampled", "k", "t"])
def test_one_tokenizer_by_this_path_is_the_ordinary_path_bit_for_bit(
    loss: tuple[str, ...], recipe: Make, start: Any
) -> None:
    """Also the end of a turn, and special tokens that a random student writes."""
    ordinary, aligned = (weights_of(start, recipe("opd", *loss, *keys)) for keys in ((), (ALIGN,)))
    assert all(torch.equal(ordinary[name], aligned[name]) for name in ordinary)


@pytest.mark.parametrize("loss", [(SAMPLED,), (SAMPLED, "teacher.span=macro"), LISTS])
def test_the_same_function_under_other_ids_teaches_nothing(
    loss: tuple[str, ...], recipe: Make, start: Any, renumbered: Path
) -> None:
    run = start(recipe("opd", *loss, ALIGN, f"teacher.path={renumbered}", "diagnostics.every=1"))
    rows, metrics, _ = stepped(run)
    numbers = {metric.name: metric.value for metric in metrics}
    for row in rows:
        assert row.taught is not None and row.signal is not None
        np.testing.assert_allclose(row.signal.sampled_logprob_T, row.taught.student_logprob_T, atol=1e-5)
    if loss == LISTS:
        assert abs(numbers["train/loss"]) < 1e-6
    assert numbers["teacher/share_one_to_one"] == numbers["teacher/share_said"] == 1
    assert numbers["overlap/reverse_kl"] == pytest.approx(0, abs=1e-6) and numbers["overlap/ratio"] == 1


def logprobs(model: LanguageModel, context: Any, answer: Any) -> torch.Tensor:
    """[T, V] through the bare module."""
    logits = model.module(input_ids=torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1]
    return logits[:, : model.num_tokens].log_softmax(-1)


def by_characters(run: TrainingRun, row: Any) -> tuple[list[int], list[tuple[range, range]]]:
    """The teacher's ids and the spans, from characters: the answers here are ASCII. Independent of engines/aligned."""
    ours, theirs = run.parts.student.tokenizer, run.parts.teacher.renderer.tokenizer
    special, answer = {*ours.all_special_ids}, list(row.rollout.answer_ids)
    ended = answer[-1] == ours.eos_token_id
    text = "".join(ours.convert_ids_to_tokens(token) for token in answer if token not in special)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    ends, place = {}, 0
    for number, token in enumerate(ids):
        place += len(theirs.convert_ids_to_tokens(token))
        ends[place] = number + 1
    spans, begun, place, before = [], [], 0, 0
    for number, token in enumerate(answer):
        if token in special:
            begun = [*begun, None] if begun else []  # a span across it says nothing
            continue
        begun, place = [*begun, number], place + 1
        if place in ends:
            if None not in begun and len(begun) <= 6:
                spans.append((range(begun[0], number + 1), range(before, ends[place])))
            begun, before = [], ends[place]
    if ended:
        spans.append((range(len(answer) - 1, len(answer)), range(len(ids), len(ids) + 1)))
        ids = [*ids, theirs.eos_token_id]
    return ids, spans


def advantages(form: str, own: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Of the tokens of one span, as published: own [n], told [m]."""
    ours, theirs = own.sum(), told.sum()
    if form == "proportional":
        return (theirs / ours - 1) * own
    return (theirs - ours).expand(len(own)) if form == "macro" else theirs / len(own) - own


@pytest.mark.parametrize("form", ["exact", "macro", "even", "proportional"])
def test_spans_have_the_gradient_of_their_definition(
    form: str, recipe: Make, start: Any, pairs_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-A log p, mean over the tokens of spans; autograd through bare modules, to 1e-5. In two micro-batches."""
    chosen = recipe("opd", SAMPLED, ALIGN, f"teacher.span={form}", f"teacher.path={pairs_digits}")
    run = start(chosen)
    run.state.max_tokens_per_micro_batch = 100
    seen: dict[str, torch.Tensor] = {}
    apply = run.parts.optimizer.step

    def catch(number: int) -> Any:
        seen.update({name: weight.grad.clone() for name, weight in run.parts.optimizer.weights.items()})
        run.parts.optimizer.zero_grad()
        return apply(number)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    with monkeypatch.context() as patch:
        patch.setattr(run.parts.optimizer, "step", lambda number: (catch(number)))
        rows, metrics = train_step(run.state, run.problems[:5])
    losses, merged = [], 0
    for row in rows:
        ids, spans = by_characters(run, row)
        answer = torch.tensor(row.rollout.answer_ids)
        own_T = logprobs(run.parts.student, row.rollout.prompt_ids, answer.tolist()).gather(-1, answer[:, None])[:, 0]
        with torch.no_grad():
            told_M = logprobs(run.parts.teacher.model, row.view.context_ids, ids)
            told_M = told_M.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        for ours, theirs in spans:
            merged += len(ours) != len(theirs)
            if form == "exact" and (len(ours), len(theirs)) != (1, 1):
                continue
            own_n = own_T[list(ours)]
            losses.append(-advantages(form, own_n.detach(), told_M[list(theirs)]) * own_n)
    assert merged > 3
    loss = torch.cat(losses).mean()
    expected = torch.autograd.grad(loss, list(run.parts.optimizer.weights.values()))
    flat, wanted = (torch.cat([g.flatten().double() for g in grads]) for grads in (seen.values(), expected))
    assert wanted.norm() > 0 and (flat - wanted).norm() / wanted.norm() < 1e-5
    numbers = {metric.name: metric.value for metric in metrics}
    assert numbers["teacher/share_one_to_one"] < 1 and numbers["teacher/share_merged"] > 0
    shares = [numbers[f"teacher/share_{name}"] for name in ("one_to_one", "merged", "masked")]
    assert sum(shares) == pytest.approx(1)
