"""A model that is proved when it is made: what it samples and what it scores are the same.

Because the head is taken out of the module, how the module turns hidden states into logits (scale, soft-cap) is read
from its config and PROVED by a few forward passes; a model that would be sampled or scored wrongly is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opdkit.contexts.render import PLAIN, read_chat_template
from opdkit.engines.causal import CausalModel, Ids
from opdkit.engines.load import load_checkpoint
from opdkit.engines.memory import enough_memory
from opdkit.engines.prove import LOW_SAME_PASS, close, proof_hidden, prove, why_not_packed
from opdkit.errors import UserError

__all__ = ["Ids", "LanguageModel"]


class LanguageModel(CausalModel):
    """See `CausalModel` for what it knows and does."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        chat_template: str | None = None,
        stop_tokens: Sequence[str | int] | None = None,
    ) -> None:
        """Raises UserError if the module is no causal language model that we can sample from and score exactly."""
        super().__init__(module, tokenizer, name=name, chat_template=chat_template, stop_tokens=stop_tokens)
        prove(self)
        self.packs = None  # to be proved before the first pass that scores

    @property
    def is_packed(self) -> bool:
        """Whether `hidden` reads rows in packed passes. Proved before the first pass that scores, not when the model
        is loaded: on CUDA a kernel is compiled for it."""
        self.prove_packed()
        return bool(self.packs)

    def prove_packed(self) -> None:
        """Find out now; what is padded is said in `notes`."""
        if self.packs is not None:
            return
        reason = why_not_packed(self)
        self.packs = reason is None
        self.positions.clear()
        if reason is not None:
            self.notes.append(
                f"{self.name} is scored and trained in padded passes, and what answers share is read for each of them: "
                f"{reason}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str,
        device: torch.device | str,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        attn_implementation: str | None = None,
        stop_tokens: Sequence[str | int] | None = None,
        base: str | None = None,
        quantization: str | None = None,
    ) -> LanguageModel:
        """Load a checkpoint folder or hub name. A PEFT adapter folder gives base plus adapter, never merged; `base` is
        where its base model is, if not where the folder says.

        `chat_template`: None, "plain", or the path of a jinja file. Raises UserError if there is no such model, it has
        no tokenizer, weights are missing from the file, or it cannot be scored exactly.
        """
        template = read_chat_template(chat_template)
        module, tokenizer, said = load_checkpoint(
            str(path),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            base=base,
            quantization=quantization,
        )
        if template not in (None, PLAIN):
            tokenizer.chat_template = template  # so that saved checkpoints carry it
        with enough_memory(f"loading {path}", "use a smaller model, or dtype bfloat16 where it is not trained"):
            module = module.to(device)
        model = cls(module, tokenizer, name=str(path), chat_template=template, stop_tokens=stop_tokens)
        model.warnings[:0] = said
        return model

    def checkpoint_activations(self, num_layers: int | None = None) -> None:
        """Trade time for memory in `hidden`: keep one state per layer, run the layer again in the backward pass; of the
        first `num_layers`, or of all.

        Raises UserError if the model cannot, or if its layers have dropout of their own that would come back on.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        if not getattr(self._base, "supports_gradient_checkpointing", False):
            raise UserError(f"{self.name} does not support gradient checkpointing; turn it off.")
        plain_NH = proof_hidden(self)
        exact = plain_NH.dtype in (torch.float32, torch.float64)
        options = {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
        # transformers 5.23 renames the method and deprecates the old name; 5.5 has only the old one.
        name = "activation_checkpointing_enable"
        enable = getattr(self._base, name if hasattr(self._base, name) else "gradient_checkpointing_enable")
        enable(options)
        layers = [m for m in self.module.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._checkpointed = tuple(layers[:num_layers])
        with torch.enable_grad():
            replayed_NH = proof_hidden(self).detach()
        if not close(replayed_NH, plain_NH, 1e-3 if exact else LOW_SAME_PASS):
            raise UserError(
                f"{self.name} has dropout inside its layers, which gradient checkpointing would switch on; "
                "set the dropout rates to 0 in its config.json or turn gradient checkpointing off."
            )
