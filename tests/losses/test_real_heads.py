"""`Head` against the modelling code of the families that transform their logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedConfig,
)

from opdkit.losses import Head, head_stats

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 1.0,
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Gemma2Config(**SIZES, final_logit_softcapping=2.0), {"softcap": 2.0}),
        (GraniteConfig(**SIZES, logits_scaling=8.0), {"logit_scale": 1 / 8}),
        (CohereConfig(**SIZES, logit_scale=0.0625), {"logit_scale": 0.0625}),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_head_equals_the_model(config: PreTrainedConfig, options: dict[str, float]) -> None:
    """Hidden states through `Head` give the log-probabilities of the model's own logits, and only with the option.
    Shows what scale and cap mean, not that `engines` reads them from a configuration."""
    models = {"gemma2": Gemma2ForCausalLM, "granite": GraniteForCausalLM, "cohere": CohereForCausalLM}
    torch.manual_seed(0)
    model = models[config.model_type](config).eval().double()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        hidden_NH = model.model(ids).last_hidden_state[0]
        wanted_NV = model(ids).logits[0].double().log_softmax(-1)
    weight_VH = model.lm_head.weight
    for head, equal in (
        (Head(weight_VH=weight_VH, num_tokens=40, **options), True),
        (Head(weight_VH=weight_VH, num_tokens=40), False),
    ):
        stats = head_stats(hidden_NH, head, k=40)
        assert stats.topk_ids_NK is not None and stats.topk_logprob_NK is not None
        got_NV = torch.empty_like(wanted_NV).scatter_(1, stats.topk_ids_NK, stats.topk_logprob_NK)
        assert torch.allclose(got_NV, wanted_NV, rtol=0, atol=1e-10) == equal
