"""What `HFEngine.score` promises: exact numbers at answer positions, whatever the batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.types import Asked, Signal

Make = Callable[..., tuple[Any, Any]]
Rows = tuple[list[list[int]], list[list[int]]]
SAMPLED, TOPK, DISTRIBUTION = Asked("sampled"), Asked("topk", 5), Asked("distribution")


def assert_same(one: Signal, other: Signal) -> None:
    for name in ("sampled_logprob_T", "topk_ids_TK", "topk_logprob_TK", "entropy_T", "hidden_TH"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if first is not None:
            np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_modules_own(name: str, temperature: float, architecture: Make, ragged: Rows) -> None:
    """Sampled log-probs, top-k and hidden states through the head, against each row alone, unpadded, through the bare
    module: log-softmax of its logits / temperature over the 38 ids of the tokenizer."""
    module, tokenizer = architecture(name)
    model = LanguageModel(module, tokenizer)
    contexts, answers = ragged
    engine = HFEngine(model)
    topk = engine.score(contexts, answers, replace(TOPK, entropy=True), temperature=temperature)
    distribution = engine.score(contexts, answers, DISTRIBUTION, temperature=temperature)
    head = model.head().trimmed(torch.float32)
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        with torch.no_grad():
            own_TV = module(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1, :38]
        own_TV = (own_TV[: len(answer)] / temperature).log_softmax(-1)
        own_T = own_TV.gather(1, torch.tensor(answer, dtype=torch.long)[:, None])[:, 0]
        values_TK, ids_TK = own_TV.topk(5)
        np.testing.assert_allclose(topk[row].sampled_logprob_T, own_T, atol=2e-5)
        np.testing.assert_allclose(topk[row].topk_logprob_TK, values_TK, atol=2e-5)
        np.testing.assert_array_equal(topk[row].topk_ids_TK, ids_TK)
        hidden_TH = distribution[row].hidden_TH
        assert hidden_TH is not None and hidden_TH.shape == (len(answer), model.hidden_width)
        ours_TV = head.logits(head.project(hidden_TH), temperature).log_softmax(-1)
        torch.testing.assert_close(ours_TV, own_TV, atol=2e-5, rtol=1e-4)
        assert distribution[row].sampled_logprob_T is None, "the head is applied once, by the loss"
        np.testing.assert_allclose(topk[row].entropy_T, -(own_TV.exp() * own_TV).sum(-1), atol=2e-5)


@pytest.mark.parametrize("asked", [SAMPLED, TOPK, DISTRIBUTION], ids=lambda asked: asked.answer)
def test_rows_do_not_depend_on_their_batch(asked: Asked, tiny_model: LanguageModel, ragged: Rows) -> None:
    """One by one, reversed, and in small batches: the same signals in the caller's order."""
    contexts, answers = ragged
    engine = HFEngine(tiny_model)
    together = engine.score(contexts, answers, asked)
    said = [signal.sampled_logprob_T if asked is not DISTRIBUTION else signal.hidden_TH for signal in together]
    assert [len(array) for array in said] == [len(answer) for answer in answers]  # type: ignore[arg-type]
    backwards = engine.score(contexts[::-1], answers[::-1], asked)[::-1]
    few = HFEngine(tiny_model, max_tokens_per_batch=30).score(contexts, answers, asked)
    for row, signal in enumerate(together):
        assert_same(signal, engine.score(contexts[row : row + 1], answers[row : row + 1], asked)[0])
        assert_same(signal, backwards[row])
        assert_same(signal, few[row])


@pytest.mark.parametrize("packs", [True, False])
def test_passes_keep_to_their_budget(packs: bool, tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positions of a pass stay below max_tokens_per_batch, except for a single row that is longer itself; rows
    that fit together go together."""
    passes: list[tuple[int, int]] = []
    hidden = tiny_model.hidden

    def record(contexts: Any, answers: Any, **options: Any) -> torch.Tensor:
        tiny_model.positions.clear()
        states = hidden(contexts, answers, **options)
        passes.append((len(contexts), tiny_model.positions["computed"]))
        return states

    monkeypatch.setattr(tiny_model, "packs", packs)
    monkeypatch.setattr(tiny_model, "hidden", record)
    lengths = [3, 60, 9, 9, 3, 3, 9, 20, 3, 3]
    HFEngine(tiny_model, max_tokens_per_batch=40).score([[2]] * 10, [[3] * (n - 1) for n in lengths], SAMPLED)
    assert sum(rows for rows, _ in passes) == 10
    assert all(computed <= 40 or rows == 1 for rows, computed in passes)
    assert len(passes) == (3 if packs else 4)  # of 112 positions, 59 are of one row


def test_only_what_was_asked(tiny_model: LanguageModel) -> None:
    """Unknown is None, arrays have the declared types, hidden states can be used in a loss."""
    contexts, answers = [[5, 6, 7]], [[8, 9, 10, 0]]
    engine = HFEngine(tiny_model)
    (sampled,), (topk,), (full,) = (engine.score(contexts, answers, asked) for asked in (SAMPLED, TOPK, DISTRIBUTION))
    assert sampled.topk_ids_TK is None and sampled.topk_logprob_TK is None and sampled.hidden_TH is None
    assert topk.hidden_TH is None and full.topk_ids_TK is None
    assert topk.sampled_logprob_T is not None and topk.topk_ids_TK is not None and topk.topk_logprob_TK is not None
    assert topk.sampled_logprob_T.dtype == topk.topk_logprob_TK.dtype == np.float32
    assert topk.topk_ids_TK.dtype == np.int64
    assert full.hidden_TH is not None and not full.hidden_TH.requires_grad and not full.hidden_TH.is_inference()
    (torch.ones(4, 32, requires_grad=True) * full.hidden_TH).sum().backward()


def test_end_of_text_is_scored_where_it_is_the_padding(tiny_model: LanguageModel) -> None:
    """Answers that hold id 0 (end of text and padding), at the end or twice, get a number for every token."""
    signals = HFEngine(tiny_model).score([[5], [5, 6]], [[7, 0], [0, 7, 0, 0]], SAMPLED)
    for signal, length in zip(signals, (2, 4), strict=True):
        assert signal.sampled_logprob_T is not None
        assert len(signal.sampled_logprob_T) == length and (signal.sampled_logprob_T < 0).all()


def test_refusals(tiny_model: LanguageModel) -> None:
    """Rows too long for the model, ids outside the tokenizer, an empty context."""
    engine = HFEngine(tiny_model)
    with pytest.raises(UserError, match="row 1 needs 97 positions"):
        engine.score([[2], [2] * 90], [[3], [3] * 7], SAMPLED)
    with pytest.raises(ValueError, match="38"):
        engine.score([[2]], [[40]], SAMPLED)
    with pytest.raises(ValueError, match="ids from 3 to 40, but the tokenizer has 38"):
        engine.score([[40]], [[3, 3]], SAMPLED)
    with pytest.raises(ValueError, match="context"):
        engine.score([[]], [[3]], SAMPLED)
    assert engine.score([], [], SAMPLED) == []
