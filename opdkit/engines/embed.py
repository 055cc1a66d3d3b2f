"""Texts as vectors, for comparing them by meaning: the mean of a model's last hidden states over a text's tokens.

That is how sentence encoders of the usual kind (MiniLM, E5, GTE) are read; any model in Hugging Face format will do,
and how well its cosines tell meaning is the model's business. Letters: n texts, T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from opdkit.engines.load import load_tokenizer, quiet_libraries
from opdkit.errors import UserError
from opdkit.types import FloatArray

TEXTS_PER_BATCH = 32
MAX_TOKENS = 512  # of a text; the rest is not read, as sentence encoders do


def embedder(model: str, *, device: str = "cpu") -> Callable[[Sequence[str]], FloatArray]:
    """A function from texts to [n, H] float32 rows of length 1. Raises UserError where the model cannot be loaded."""
    from transformers import AutoModel

    tokenizer = load_tokenizer(model, trust_remote_code=False)
    try:
        with quiet_libraries():
            module = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model} cannot be loaded to embed texts: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = min(MAX_TOKENS, getattr(module.config, "max_position_embeddings", MAX_TOKENS))

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> FloatArray:
        parts = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            read = tokenizer(
                list(texts[start : start + TEXTS_PER_BATCH]),
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(device)
            hidden_nTH = module(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state
            mask_nT1 = read["attention_mask"].unsqueeze(-1)
            mean_nH = (hidden_nTH * mask_nT1).sum(1) / mask_nT1.sum(1).clamp(min=1)
            parts.append(torch.nn.functional.normalize(mean_nH, dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return embed
