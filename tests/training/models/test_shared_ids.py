"""Models of one tokenizer of which one has a row less (Gemma 3 4B and 1B): both know the ids that both have."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.training.models.other_models import limit_to_common


def model(rows: int, tokenizer: Any) -> LanguageModel:
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=0,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer)


def test_ids_that_one_model_lacks_do_not_exist_for_the_other(tiny_tokenizer: Callable[[], Any]) -> None:
    """The larger student no longer samples the last id, however likely; heads have one size, as the losses ask."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    student, teacher = model(39, tokenizer), model(38, tokenizer)
    with torch.no_grad():
        student.module.lm_head.weight[38] = student.module.lm_head.weight[37] * 100
    limit_to_common(student, teacher)
    assert student.head().num_tokens == teacher.head().num_tokens == 38
    answers = HFEngine(student).sample([[5, 6]] * 20, range(20), SamplingParams(max_answer_tokens=8))
    assert all(token < 38 for answer in answers for token in answer.answer_ids)
