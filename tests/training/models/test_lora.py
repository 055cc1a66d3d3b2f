"""What LoRA adapts: a rule, said in a sentence; names that fit nothing, or nothing that runs, are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.recipe.model_sections import LoraSection
from opdkit.training.models.lora import with_lora

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
NEMOTRON = {
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 4,
}


@pytest.fixture
def student(tiny_tokenizer: Callable[[], Any]) -> Callable[..., LanguageModel]:
    def make(kind: str, **config: Any) -> LanguageModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | config)))
        return LanguageModel(module.eval(), tiny_tokenizer(), name=kind)

    return make


def adapted(student: LanguageModel, targets: Any = "all-linear") -> tuple[set[str], str]:
    """(names of the adapted matrices' kinds, the sentence)"""
    model = with_lora(student, LoraSection(r=2, alpha=4, target_modules=targets), path="models/none", seed=0)
    names = {n.partition(".lora_A")[0].rpartition(".")[2] for n, _ in model.module.named_parameters() if ".lora_A" in n}
    return names, next(note for note in model.notes if note.startswith("LoRA"))


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("kind", "config", "kinds", "said"),
    [
        ("qwen3", {}, ATTENTION | {"gate_proj", "up_proj", "down_proj"}, "14 matrices"),
        ("falcon_h1", MAMBA, ATTENTION | {"in_proj", "gate_proj", "up_proj", "down_proj"}, "2 whose weights Mamba"),
        ("nemotron_h", NEMOTRON, ATTENTION | {"in_proj", "up_proj", "down_proj"}, "experts, "),
        ("gpt_oss", {}, ATTENTION, "experts, "),
        ("qwen3_moe", {}, ATTENTION, "experts, "),
        ("gpt2", {}, {"c_attn", "c_proj", "c_fc"}, "of the model's"),
    ],
)
def test_default_targets(
    kind: str, config: dict[str, Any], kinds: set[str], said: str, student: Callable[..., LanguageModel]
) -> None:
    """`all-linear` works where peft's refuses (Mamba) or would silently adapt experts in place of dense layers."""
    names, sentence = adapted(student(kind, **config))
    assert names == kinds
    assert said in sentence and "are trained" in sentence


def test_a_dense_layer_does_not_turn_into_experts(student: Callable[..., LanguageModel]) -> None:
    """In DeepSeek-V3 peft takes `down_proj` for the fused experts'; the default leaves it alone and says so."""
    mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    config = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    names, sentence = adapted(student("deepseek_v3", **mla, **config))
    assert "experts" not in names and "down_proj" not in names and "o_proj" in names
    assert "whose names peft takes for those of the fused experts" in sentence


def test_targets_by_name_and_by_pattern(student: Callable[..., LanguageModel]) -> None:
    assert adapted(student("qwen3"), ["q_proj", "v_proj"])[0] == {"q_proj", "v_proj"}
    names, sentence = adapted(student("qwen3"), r".*layers\.0\.mlp\.(up|down)_proj")
    assert names == {"up_proj", "down_proj"} and "on 2 matrices" in sentence


@pytest.mark.parametrize("targets", [["q_proj", "query"], "query", ["lm_head"], ["gate_up_proj"], "(", ["experts"]])
def test_targets_that_fit_nothing_are_refused(targets: Any, student: Callable[..., LanguageModel]) -> None:
    """Each name on its own: peft takes a list of which one name fits, and says nothing of the others."""
    with pytest.raises(UserError, match=r"choose among: .*q_proj|no regular expression"):
        adapted(student("qwen3_moe"), targets)


def test_an_adapter_that_never_runs_is_refused(student: Callable[..., LanguageModel]) -> None:
    model = student("qwen3")
    model.body.add_module("unused", torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match="1 of the adapters are never used"):
        adapted(model, ["q_proj", "unused"])
