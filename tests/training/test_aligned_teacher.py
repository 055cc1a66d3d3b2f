"""Runs with a teacher that has another tokenizer: what is taught is what the definition says, and nothing is filled in.

The alignment itself: tests/engines/test_aligned.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdkit.engines.model import LanguageModel
from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.recipe import Recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.models.sides import read_sides
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


@pytest.mark.parametrize(
    "loss", [(SAMPLED,), LISTS, ("method.support=teacher_topk", "method.k=3")], ids=["sampled", "k", "t"]
)
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
    run.state.passes = replace(run.state.passes, max_tokens=100)
    seen: dict[str, torch.Tensor] = {}

    def catch(_: int) -> StepResult:
        seen.update({name: weight.grad.clone() for name, weight in run.parts.optimizer.weights.items()})
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
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


def test_lists_are_compared_where_one_token_is_one_token(
    recipe: Make, start: Any, pairs_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL(student || teacher) on the student's 4 likeliest of the ids that both have, the rest of each side in a bucket:
    through bare modules, to 1e-5. Of a teacher's list the entries are the student's ids."""
    chosen = recipe("opd", *LISTS, ALIGN, f"teacher.path={pairs_digits}", "diagnostics.every=1")
    run = start(chosen)
    ours, theirs = run.parts.student.tokenizer, run.parts.teacher.renderer.tokenizer
    special, their_vocab = {*ours.all_special_ids}, theirs.get_vocab()
    shared = {i: their_vocab[t] for t, i in ours.get_vocab().items() if i not in special}
    shared[ours.eos_token_id] = theirs.eos_token_id
    seen: list[dict[str, torch.Tensor]] = []

    def catch(_: int) -> StepResult:
        seen.append({name: weight.grad.clone() for name, weight in run.parts.optimizer.weights.items()})
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    rows, metrics = train_step(run.state, run.problems[:5])
    losses, known = [], torch.tensor(sorted(shared))
    for row in rows:
        ids, spans = by_characters(run, row)
        own_TV = logprobs(run.parts.student, row.rollout.prompt_ids, row.rollout.answer_ids)
        with torch.no_grad():
            told_MW = logprobs(run.parts.teacher.model, row.view.context_ids, ids)
        for (place, *rest), (their_place, *others) in spans:
            if not rest and not others:
                listed = known[own_TV[place, known].topk(4).indices]
                told_k = told_MW[their_place, [shared[token] for token in listed.tolist()]]
                both = [torch.cat([x, torch.log1p(-x.exp().sum())[None]]) for x in (own_TV[place, listed], told_k)]
                losses.append((both[0].exp() * (both[0] - both[1])).sum())
    loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(loss, list(run.parts.optimizer.weights.values()))
    flat, wanted = (torch.cat([g.flatten().double() for g in grads]) for grads in (seen[0].values(), expected))
    assert wanted.norm() > 0 and (flat - wanted).norm() / wanted.norm() < 1e-5
    numbers = {metric.name: metric.value for metric in metrics}
    assert numbers["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert numbers["overlap/num_tokens"] == len(losses)
    answers, contexts = [row.rollout.answer_ids for row in rows], [row.view.context_ids for row in rows]
    for signal in run.parts.teacher.score(contexts, answers, Asked("topk", 5), temperature=1.0):
        assert {*signal.topk_ids_TK[signal.spans.said_T].flatten().tolist()} <= shared.keys()
        assert np.isnan(signal.topk_logprob_TK[~signal.spans.said_T]).all()


def spans_of(*index: int, spread: str = "macro") -> Spans:
    index_T = np.array(index, dtype=np.int64)
    counts = {number: index.count(number) for number in index}
    return Spans(
        index_T=index_T,
        is_single_T=np.array([counts[number] == 1 for number in index]),
        said_T=index_T >= 0,
        has_digit_T=np.zeros(len(index), dtype=np.bool_),
        spread=spread,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("form", "advantage"), [("macro", [0.5, 0.5, 0.5]), ("proportional", [0.0625, 0.3125, 0.125])])
def test_a_span_of_three_digits_by_hand(form: str, advantage: list[float]) -> None:
    """s = -.1, -.5, -.2 and t("201") = -.3: L_T - L_S = .5. Before it a single token, behind it one in no span."""
    own_T = np.array([-1.0, -0.1, -0.5, -0.2, -9.0], dtype=np.float32)
    told_T = np.array([-0.25, -0.1, -0.1, -0.1, np.nan], dtype=np.float32)  # t / 3 each: `even`
    said = spread(Signal(sampled_logprob_T=told_T, spans=spans_of(0, 1, 1, 1, -1, spread=form)), own_T)
    np.testing.assert_allclose(said.sampled_logprob_T[1:4] - own_T[1:4], advantage, atol=1e-6)
    assert said.sampled_logprob_T[0] == np.float32(-0.25) and np.isnan(said.sampled_logprob_T[4])
    # A student that was sure divides by nothing; of a span with a token nobody asked about, nothing is said.
    sure = spread(
        Signal(sampled_logprob_T=told_T[:4], spans=spans_of(0, 1, 1, 1, spread=form)), np.zeros(4, np.float32)
    )
    assert np.isfinite(sure.sampled_logprob_T).all()
    own_T[2] = np.nan
    assert spread(replace(said, sampled_logprob_T=told_T), own_T).spans.said_T.tolist() == [True, *[False] * 4]


def test_a_teacher_that_says_next_to_nothing_stops_the_run(recipe: Make, start: Any) -> None:
    run = start(recipe("opd"))
    rollout = train_step(run.state, run.problems[:1])[0][0].rollout
    silent = spans_of(*[-1] * len(rollout.answer_ids))
    with pytest.raises(UserError, match=r"says something of 0\.0 % of this step's tokens"):
        check_coverage([(rollout, silent)])
    check_coverage([])
    check_coverage([(rollout, None)])


def test_two_aligned_views_of_which_one_reads_the_students_answers(
    recipe: Make, start: Any, pairs_digits: Path
) -> None:
    """The evidence is the text that the student wrote, in the teacher's tokens; a mixture of both views is learned."""
    wording = "{ layout = '{question}{failure}', failure = ';{text}' }"
    peers = f"{{ kind = 'peers', slots = ['failure'], feedback = 'never', wording = {wording} }}"
    other = f"{{ kind = 'model', path = '{pairs_digits}', tokens = 'align', span = 'even' }}"
    keys = (f"views.other={{ teacher = {other}, context = {peers} }}", "method.target={ teacher = 0.5, other = 0.5 }")
    run = start(
        recipe("opd", SAMPLED, ALIGN, "teacher.span=proportional", f"teacher.path={pairs_digits}", *keys), [0, 0]
    )
    rows, metrics, _ = stepped(run)
    ours, theirs = run.parts.renderer, run.parts.teacher.renderer.tokenizer
    for row, sibling in zip(rows[::2], rows[1::2], strict=True):
        read = "".join(theirs.convert_ids_to_tokens(row.views["other"].context_ids))
        assert ours.answer_text(sibling.rollout.answer_ids).strip() in read
    numbers = {metric.name: metric.value for metric in metrics}
    assert numbers["views/other/share_said"] > 0.5 and np.isfinite(numbers["train/loss"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ((), 'method.support = "full" compares whole vocabularies'),
        ((*LISTS, "teacher.span=even"), 'teacher.span = "even" tells of spans'),
        ((SAMPLED, "method.without_context=dilute"), 'method.without_context = "dilute"'),
        (("method.divergence=forward_kl", *LISTS, "method.answers=teacher"), 'method.answers = "teacher"'),
        ((SAMPLED, "teacher.tokens=same", "teacher.span=even"), 'teacher.span = "even" is only read with'),
        ((SAMPLED, "teacher.tokens=same", "teacher.pair_stops=false"), "teacher.pair_stops = false is only read with"),
        ((SAMPLED, "weights.tokens={ name = 'soft_or' }"), "[weights] compares whole vocabularies"),
        (
            (
                *LISTS,
                "views.b={ teacher = { kind = 'self', weights = 'initial' } }",
                "method.target={teacher=2.0,b=-1.0}",
            ),
            "a target of several views",
        ),
        ((SAMPLED, "teacher={ kind = 'self', weights = 'initial', tokens = 'align' }"), 'teacher.kind = "model"'),
    ],
)
def test_what_cannot_be_asked_is_refused(keys: tuple[str, ...], sentence: str, recipe: Make) -> None:
    with pytest.raises(UserError) as refused:
        recipe("opd", ALIGN, *keys)
    assert sentence in str(refused.value)


def test_sides_are_refused_where_one_thinks_and_more_candidates_are_asked_than_there_are(
    recipe: Make, pairs_digits: Path, tmp_path: Path
) -> None:
    """And what `check --models` says where all is well."""
    chosen = ("opd", *LISTS, ALIGN, f"teacher.path={pairs_digits}")
    warned = read_sides(recipe(*chosen)).warnings
    (said,) = [sentence for sentence in warned if ": another tokenizer." in sentence]
    assert any("cut numbers at other places" in sentence for sentence in warned)
    by_spans = read_sides(recipe("opd", SAMPLED, *chosen[-2:], "teacher.span=even")).warnings
    assert not any("cut numbers" in sentence for sentence in by_spans)
    assert "4 of the 10 tokens of '12+345=357' are one token on both sides" in said
    thinking = tmp_path / "thinking.jinja"
    thinking.write_text(
        "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}"
    )
    with pytest.raises(UserError, match="answers begin inside a thought, the teacher's without a thought"):
        read_sides(recipe(*chosen, f"model.chat_template={thinking}"))
    with pytest.raises(UserError, match=r"method\.k = 500, but with teacher\.tokens = \"align\" only the \d+ tokens"):
        read_sides(recipe(*chosen, "method.k=500"))
