"""Where a Hugging Face module keeps its transformer and its head, and what it does with the head's output.

Read from config and module names; `engines.prove` is what makes it trustworthy.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opdkit.errors import UserError


def text_body(base: PreTrainedModel, name: str) -> nn.Module:
    """The transformer that reads text, without its head; `base` itself if there is none below it.

    In a model that reads images too, the text model alone: image tokens that the student writes mean nothing there.
    Raises UserError for an encoder-decoder.
    """
    if base.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; use a decoder-only causal language model.")
    body: nn.Module = base.base_model
    if base.config.get_text_config(decoder=True) is not base.config:
        body = base.get_decoder()
    if body is base or body.get_output_embeddings() is not None:
        # Llama 4's text model is not where its class says, and the one that reads images has it with a head
        body = next((child for child in body.children() if isinstance(child, PreTrainedModel)), base)
    return body


def unread_parts(base: PreTrainedModel, body: nn.Module) -> dict[str, nn.Module]:
    """Modules that text never passes (vision towers, projectors), by name: everything beside body and head."""
    read = {id(parameter) for parameter in body.parameters()}
    head = base.get_output_embeddings()
    read |= {id(parameter) for parameter in head.parameters()}
    parts: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        parameters = [id(parameter) for parameter in module.parameters()]
        if parameters and not read.intersection(parameters):
            parts[name] = module
        elif not read.issuperset(parameters):
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(base, "")
    return parts


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap): logits = cap(scale * (hidden @ weight.T + bias))."""
    text = config.get_text_config(decoder=True)
    scale = 1.0
    for name, power in LOGIT_SCALES.items():
        if getattr(text, name, None) is not None:
            scale *= getattr(text, name) ** power
    caps = [getattr(text, name, None) for name in LOGIT_CAPS]
    return scale, next((cap for cap in caps if cap is not None), None)


LOGIT_SCALES = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_mup_width_multiplier": -1,  # Inkling
}
LOGIT_CAPS = (
    "final_logit_softcapping",  # Gemma 2, 3n, 4
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


def check_parts(base: PreTrainedModel, body: nn.Module, name: str, peft_config: Any) -> None:
    """Raise UserError unless body and head can be taken apart. `peft_config`: of the adapter, None without one."""
    if peft_config is not None and peft_config.is_prompt_learning:
        raise UserError(
            f"{name} is a {peft_config.peft_type} adapter; only adapters inside the layers (LoRA) are supported."
        )
    head = base.get_output_embeddings()
    if head is None or body is base:
        raise UserError(f"{name} has no language-model head; use a causal language model.")
    weight = getattr(head, "weight", None)
    adapted = hasattr(head, "base_layer") or hasattr(head, "original_module")  # how peft wraps what it adapts or copies
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or adapted:
        raise UserError(
            f"the output head of {name} is a {type(head).__name__}, not one plain matrix; "
            "leave the head out of the adapter's targets and of modules_to_save, and unquantised."
        )


def num_rows(base: PreTrainedModel) -> int:
    """Ids that have both an input embedding and an output row."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    return min(head.weight.shape[0], embedding.weight.shape[0])


def ids_without_rows(tokenizer: Any, rows: int, name: str) -> list[tuple[int, str]]:
    """(id, token) of the tokenizer's ids that the model has no rows for; they must be tokens that were added to it.

    Gemma 3 1B and 270M share a tokenizer with models that read images: its last id is the image's. Raises UserError
    where ordinary vocabulary lies beyond the rows: that tokenizer belongs to another model.
    """
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    added = tokenizer.get_added_vocab()
    if any(token not in added for _, token in beyond):
        raise UserError(
            f"{name} has {rows} output rows for a tokenizer of {beyond[-1][0] + 1} tokens; "
            "use the tokenizer the model was trained with, or resize the model's embeddings."
        )
    return beyond
