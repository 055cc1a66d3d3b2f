"""Random models of given sizes with a tokenizer of as many tokens, one for each character, as ordinary checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as CausalLM
from transformers import GenerationConfig, LlamaConfig, Qwen3Config

from opdkit.engines.scratch import char_tokenizer
from opdkit.types import seed_from

LETTERS = ["\n", *(chr(number) for number in (*range(0x20, 0x7F), *range(0x4E00, 0xD7A3), *range(0x10000, 0x40000)))]
NUM_SPECIAL = len(char_tokenizer("a")) - 1  # the first ids
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3}  # fmt: skip
SIZES = {"small": (Qwen3Config, SMALL), "smollm2": (LlamaConfig, SMOLLM2)}


def make_models(folder: Path, size: str, vocabulary: int, stop_every: int | None = None) -> None:
    """`folder`/student and `folder`/teacher. stop_every: so many tokens are stop tokens that a model that knows
    nothing ends an answer after that many on average."""
    tokenizer = char_tokenizer("".join(LETTERS[: vocabulary - NUM_SPECIAL]))
    assert len(tokenizer) == vocabulary
    tokenizer.model_max_length = 4096
    kind, sizes = SIZES[size]
    stops = [tokenizer.eos_token_id]
    if stop_every is not None:
        stops += range(vocabulary - max(1, round(vocabulary / stop_every)), vocabulary)
    for name in ("student", "teacher"):
        config = kind(
            **sizes,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed_from("bench", name))
        model = CausalLM.from_config(config, dtype=torch.float32)
        model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def texts(count: int, length: int, vocabulary: int, seed: str) -> list[str]:
    """Random characters, none of them a space: nothing strips them."""
    chosen = random.Random(seed_from("bench", seed))
    letters = LETTERS[2 : vocabulary - NUM_SPECIAL]
    return ["".join(chosen.choices(letters, k=length)) for _ in range(count)]


def lengths(case: dict[str, Any]) -> list[int]:
    """Of the answers: all alike, or log-normal from 20 to the longest, which one of every group has."""
    longest, count = case["answer"], case["problems"] * case["group"]
    if not case.get("ragged"):
        return [longest] * count
    chosen = random.Random(seed_from("bench", "lengths"))
    drawn = [min(longest, max(20, round(chosen.lognormvariate(4.9, 0.8)))) for _ in range(count)]
    return [longest if row % case["group"] == 0 else length for row, length in enumerate(drawn)]
