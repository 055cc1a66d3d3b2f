"""Tiny models of many architectures, made from their configs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHARED: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 7, "final_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 7}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}),
}
Make = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def architecture(tiny_tokenizer: Callable[[], Any]) -> Make:
    """`architecture("gemma2", **config)`: a module of that type with random weights, and a tokenizer of 38 ids."""

    def make(name: str, **changes: Any) -> tuple[Any, Any]:
        kind, own = CONFIGS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(kind(**(SHARED | own | changes)))
            for parameter in module.parameters():  # biases and norms at 0 and 1 would hide mistakes
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
        return module.eval(), tiny_tokenizer()

    return make


@pytest.fixture
def ragged() -> tuple[list[list[int]], list[list[int]]]:
    """(contexts, answers) of very different lengths, one answer empty; all others end with id 0, end of text."""
    rng = np.random.default_rng(0)
    lengths = [(5, 7), (1, 12), (20, 3), (4, 0), (9, 1)]
    contexts = [rng.integers(0, 38, context).tolist() for context, _ in lengths]
    return contexts, [[*rng.integers(0, 38, answer - 1).tolist(), 0] if answer else [] for _, answer in lengths]
