"""Models of real shapes with random weights, made on the device: nothing is downloaded, no weight touches a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from opdkit.engines.model import LanguageModel
from opdkit.engines.scratch import CHAR_TEMPLATE
from opdkit.tasks import arithmetic

VOCABULARY, ROWS = 151669, 151936  # of Qwen3: ids, and rows of the head
SHAPES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VOCABULARY, TINY_ROWS = 301, 320


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """One token a character of the arithmetic task, and names for all other ids."""
    characters = ["<|endoftext|>", "<s>", "<u>", "<a>", "<e>", *dict.fromkeys(arithmetic.ALPHABET + "()")]
    words = [*characters, *(f"<word-{number}>" for number in range(size - len(characters)))]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<none>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<e>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<s>", "<u>", "<a>"],
    )
    tokenizer.chat_template = CHAR_TEMPLATE
    return tokenizer


def write_shape(folder: Path, shape: str, tiny: bool) -> Path:
    """A model's folder without weights: `built` makes them."""
    rows = TINY_ROWS if tiny else ROWS
    own = TINY if tiny else SHAPES[shape]
    config = Qwen3Config(
        **own, num_key_value_heads=2 if tiny else 8, head_dim=16 if tiny else 128, vocab_size=rows,
        tie_word_embeddings=shape != "8B", max_position_embeddings=131072, eos_token_id=4, pad_token_id=0,
        initializer_range=0.02,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer_of(TINY_VOCABULARY if tiny else VOCABULARY).save_pretrained(folder)
    return folder


def built(path: Any, *, dtype: Any, device: Any, **how: Any) -> LanguageModel:
    """In place of `LanguageModel.load`: the config's model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(module, AutoTokenizer.from_pretrained(path), name=str(path))
