"""A model's size from its config alone is the size of the model that transformers builds. Not that a GPU's kernels keep
what a CPU's keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3MoeConfig

from opdkit.cost.build import size_from_config
from opdkit.cost.size import known_sizes
from opdkit.errors import UserError

TINY: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 301, "head_dim": 12,
}  # fmt: skip


def written(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def test_a_size_is_that_of_the_real_model(tmp_path: Path) -> None:
    """Parameters (tied and untied), cache, LoRA's matrices, and to 5 % the bytes that autograd saves of a real pass."""
    for tied in (True, False):
        config = LlamaConfig(**TINY, tie_word_embeddings=tied)
        size = size_from_config(written(config, tmp_path / str(tied)))
        model = LlamaForCausalLM(config)
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert (size.tied, size.vocabulary, size.hidden, size.layers) == (tied, 301, 48, 3)
    assert size.cached == 3 * 2 * 2 * 12 and size.attention == 3 * 4 * 12
    assert size.adapters(8) == 8 * 3 * ((48 + 48) + 2 * (48 + 24) + (48 + 48) + 2 * (48 + 80) + (80 + 48))
    assert size.active == sum(p.numel() for n, p in model.model.named_parameters() if "embed" not in n)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = model.model(input_ids=torch.zeros(1, 500, dtype=torch.long), use_cache=False)
    assert size.passes["float32"].kept == pytest.approx(sum(kept.values()) / 500, rel=0.05)
    del output


def test_experts_and_windows(tmp_path: Path) -> None:
    """By hand: a token is sent to 2 of 8 experts; every second layer sees 16 positions."""
    config = Qwen3MoeConfig(**TINY, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    size = size_from_config(written(config, tmp_path / "moe"))
    experts = 3 * 8 * 3 * 48 * 16
    layers = size.parameters - 2 * 301 * 48
    assert size.active == layers - experts * 6 // 8 - 48 + 48
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(**TINY, use_sliding_window=True, sliding_window=16, layer_types=kinds)
    size = size_from_config(written(config, tmp_path / "window"))
    assert (size.cached, size.window_cached, size.window) == (48, 96, 16)
    assert size.cached_in(100) == 100 * 48 + 16 * 96


def test_the_table_has_the_published_counts() -> None:
    """Parameters as the models' cards and weight files have them."""
    published = {
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-14B": 14_768_307_200,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
        "Qwen/Qwen2.5-Math-7B-Instruct": 7_615_616_512,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    }
    assert {name: known_sizes()[name].parameters for name in published} == published
    # 24.7 kB for each token and layer of SmolLM2 in bfloat16 were measured on the real model.
    smol = known_sizes()["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert smol.passes["bfloat16"].kept / smol.layers == pytest.approx(24_700, rel=0.01)


def test_what_is_no_config_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"no readable config\.json"):
        size_from_config(tmp_path)
    file.write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(UserError, match="no causal language model can be built"):
        size_from_config(file)
