"""Packed passes and shared beginnings: the states and gradients of every row alone, or no packed pass at all.

On a CPU. The kernels of CUDA are not run: the block mask that flex attention gets is read by sdpa, and flash attention
with lengths is a loop over them (both through transformers' own tables, as on a GPU).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opdkit.engines.forward import packed, passes
from opdkit.engines.forward.passes import Passes
from opdkit.engines.model import LanguageModel

Make = Callable[..., tuple[Any, Any]]
SHARING, ALONE = Passes(1000, 1, 4), Passes(1000, 1, None)


def family() -> tuple[list[list[int]], list[list[int]]]:
    """Siblings, two of whom share more than the prompt, beside a cousin, a stranger and an empty answer."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 38, 12).tolist()
    longer = [*prompt, *rng.integers(2, 38, 9).tolist()]
    contexts = [prompt, prompt, longer, longer, rng.integers(2, 38, 5).tolist(), [3], [4, 5]]
    answers = [rng.integers(2, 38, length).tolist() for length in (9, 3, 14, 11, 12, 6, 0)]
    return contexts, answers


def states_and_gradients(model: LanguageModel, passes: Passes, dtype: Any = None) -> tuple[Tensor, Tensor]:
    """dtype: of other weights, in the place of the model's."""
    others = {name: (p * 1.1).to(dtype) for name, p in model.module.named_parameters()} if dtype else None
    hidden_NH = model.hidden(*family(), passes=passes, weights=others)
    sign_NH = (torch.arange(hidden_NH.numel()).view_as(hidden_NH) % 7 - 3).to(hidden_NH.dtype)
    model.module.zero_grad()
    (hidden_NH * sign_NH).sum().backward()
    grads = [p.grad.flatten() for p in model.module.parameters() if p.grad is not None]
    return hidden_NH.detach(), torch.cat(grads)


def assert_packed_is_padded(model: LanguageModel, tolerance: float = 1e-6, dtype: Any = None) -> None:
    model.packs = False
    hidden_NH, gradient = states_and_gradients(model, ALONE, dtype)
    model.packs = True
    for how, num_computed in ((ALONE, 121), (SHARING, 76)):
        model.positions.clear()
        ours_NH, our_gradient = states_and_gradients(model, how, dtype)
        assert abs(model.positions["distinct"] - num_computed) <= 1  # the rule may share a token more or less
        assert (ours_NH - hidden_NH).norm() <= tolerance * hidden_NH.norm()
        assert (our_gradient - gradient).norm() <= 2 * tolerance * gradient.norm()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe"])
def test_packed_passes_have_the_states_and_gradients_of_padded_ones(
    name: str, architecture: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without sharing, with and without checkpointed activations (which run a layer again in the backward
    pass); gemma3 reads windows of 7 tokens. Branches are read four columns at once, so that there are several pieces,
    and some of them beyond a window."""
    monkeypatch.setattr(packed, "_MASKED_PIECE", 4)
    model = LanguageModel(*architecture(name))
    assert model.is_packed and not model.notes
    assert_packed_is_padded(model)
    model.checkpoint_activations()
    assert_packed_is_padded(model)


def test_windows_leave_pieces_out(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece reads only pieces that its window reaches, so that a long row costs no more than its windows."""
    monkeypatch.setattr(packed, "_MASKED_PIECE", 4)
    model = LanguageModel(*architecture("gemma3"))
    seen: list[int] = []
    mask = packed._Pieces.mask

    def record(self: Any, number: int, dtype: torch.dtype) -> Tensor | None:
        seen.append(len(self.pieces[number].path))
        return mask(self, number, dtype)

    assert model.is_packed
    monkeypatch.setattr(packed._Pieces, "mask", record)
    model.hidden([[5]], [[7] * 60])
    assert max(seen) == 3  # 7 tokens reach back into two pieces of four


def test_adapters_and_other_weights(architecture: Make) -> None:
    """LoRA with its adapter on and off, and stand-ins for weights (an average, copies in another precision)."""
    from peft import LoraConfig, get_peft_model

    module, tokenizer = architecture("qwen3")
    adapted = get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = LanguageModel(adapted, tokenizer)
    assert model.is_packed
    assert_packed_is_padded(model)
    with model.adapter_off(), torch.no_grad():
        shared_NH = model.hidden(*family(), passes=SHARING)
        model.packs = False
        torch.testing.assert_close(shared_NH, model.hidden(*family()), atol=1e-5, rtol=1e-5)
    plain = LanguageModel(*architecture("qwen3"))
    assert plain.is_packed
    assert_packed_is_padded(plain, 1e-7, torch.float64)  # gradients arrive in float32
    assert_packed_is_padded(plain, 2e-2, torch.bfloat16)


def test_rows_of_one_length_are_one_call(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the attention of a layer, with the bits that each row has alone, and its gradient."""
    model = LanguageModel(*architecture("qwen3"))
    assert model.is_packed
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 38, length).tolist() for length in (9, 4, 9, 9, 4)]
    calls: list[int] = []
    real = packed._attention_of(model.body.layers[0].self_attn, "sdpa")

    def record(module: Any, query: Tensor, *others: Any, **options: Any) -> Any:
        calls.append(len(query))
        return real(module, query, *others, **options)

    monkeypatch.setattr(packed, "_attention_of", lambda module, name: record)
    together = [part.detach() for part in model.hidden([[3]] * 5, rows, passes=ALONE).split([*map(len, rows)])]
    assert sorted(set(calls)) == [2, 3] and len(calls) == 2 * len(model.body.layers)
    calls.clear()
    model.hidden([[3] * 12] * 5, rows, passes=SHARING)  # and behind a beginning that they share
    assert sorted(set(calls)) == [1, 2, 3] and len(calls) == 3 * len(model.body.layers)
    alone = [model.hidden([[3]], [row], passes=ALONE).detach() for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_row_does_not_see_what_it_is_packed_with(architecture: Make) -> None:
    """Other rows may be anything, and the implementation that the model was loaded with is back after every pass."""
    model = LanguageModel(*architecture("qwen3"))
    before = model.config._attn_implementation
    assert model.is_packed
    contexts, answers = family()
    together = model.hidden(contexts, answers, passes=SHARING)
    start = len(answers[0])
    alone = model.hidden(contexts[1:2], answers[1:2], passes=SHARING)
    torch.testing.assert_close(together[start : start + len(answers[1])], alone, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="tokenizer has 38"):
        model.hidden([[1, 40]], [[2]])
    assert model.config._attn_implementation == before


# What CUDA does, through its own tables


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_block_mask_of_flex_attention(name: str, architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tree, windows and filling, read densely by sdpa: states and gradients of padded passes."""
    from torch.nn.attention.flex_attention import create_mask

    def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert query.shape[2] % packed._BLOCK == 0
        allowed = create_mask(mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, allowed, **options)

    model = LanguageModel(*architecture(name))
    assert model.is_packed
    monkeypatch.setattr("opdkit.engines.causal.way_of", lambda *of: "flex")
    monkeypatch.setattr("transformers.integrations.flex_attention.flex_attention_forward", dense)
    assert_packed_is_padded(model)


def test_flex_attention_itself(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass, not compiled; there is no backward on a CPU."""
    model = LanguageModel(*architecture("gemma3"))
    assert model.is_packed
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad():
            expected_NH = model.hidden(*family(), passes=ALONE)
            monkeypatch.setattr("opdkit.engines.causal.way_of", lambda *of: "flex")
            torch.testing.assert_close(model.hidden(*family(), passes=SHARING), expected_NH, atol=1e-5, rtol=1e-5)
    finally:
        torch.compiler.set_stance("default")


def test_flash_attention_gets_the_lengths(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was loaded with flash attention: rows one behind the other with their lengths, and no trees."""

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if "cu_seq_lens_q" not in options:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **options)
        sizes = options["cu_seq_lens_q"].diff().tolist()
        assert mask is None and options["max_length_k"] == max(sizes)
        rows = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
        read = [ALL_ATTENTION_FUNCTIONS["sdpa"](module, *row, None, scaling=options["scaling"])[0] for row in rows]
        return torch.cat(read, dim=1), None

    model = LanguageModel(*architecture("qwen3"))
    expected_NH, expected = states_and_gradients(model, ALONE)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    model.packs = True
    model.positions.clear()
    hidden_NH, gradient = states_and_gradients(model, SHARING)
    assert model.positions["computed"] == model.positions["rows"] == 121
    torch.testing.assert_close(hidden_NH, expected_NH, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


# What cannot be packed


def test_what_a_packed_pass_would_mix_is_padded(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that lets rows see each other is found out by the proof; the model is padded, planned by the cost of
    padding, and says so."""
    model = LanguageModel(*architecture("qwen3"))
    monkeypatch.setattr(packed._Pieces, "mask", lambda self, number, dtype: None)
    attention = packed._attention_of

    def mixed(module: Any, name: str) -> Any:
        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            return attention(module, name)(module, query, key.roll(1, 1), value, mask, **options)

        return attend

    monkeypatch.setattr(packed, "_attention_of", mixed)
    assert not model.is_packed
    assert "padded passes" in model.notes[0] and "its states are others" in model.notes[0]
    contexts, answers = family()
    lengths = [len(c) + max(0, len(a) - 1) for c, a in zip(contexts, answers, strict=True)]
    assert model.planned(contexts, answers, SHARING) == passes.plan_padded(lengths, SHARING)
    model.positions.clear()
    model.hidden(contexts, answers)
    assert model.positions["computed"] == 6 * 34 and model.positions["distinct"] == 121


def test_a_library_that_refuses_is_no_end(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("no such mask")

    model = LanguageModel(*architecture("qwen3"))
    monkeypatch.setattr(packed, "_Pieces", refuse)
    assert not model.is_packed and "NotImplementedError: no such mask" in model.notes[0]
    assert len(model.hidden(*family())) == 55
