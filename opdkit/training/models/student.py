"""The student, as the recipe asks for it: full weights in float32, or LoRA adapters over a frozen base."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from opdkit.engines.devices import doubts_of
from opdkit.engines.load import pick_device
from opdkit.engines.model import LanguageModel
from opdkit.losses.kernels.kernel_proof import prove
from opdkit.recipe import Recipe
from opdkit.training.models.lora import with_lora


def load_student(recipe: Recipe, *, resume_from: Path | None = None, on_host: bool = False) -> LanguageModel:
    """Load the student ready for training; `resume_from` is a checkpoint's model folder. on_host: it is moved to the
    recipe's device by the caller."""
    section, device = recipe.model, pick_device(recipe.model.device)
    compute = getattr(torch, section.dtype)
    is_adapter = section.lora is not None or os.path.exists(Path(section.path) / "adapter_config.json")
    student = LanguageModel.load(
        resume_from or section.path,
        # A frozen base is not trained.
        dtype=compute if is_adapter else getattr(torch, recipe.train.master_dtype),
        device="cpu" if on_host else device,
        trust_remote_code=section.trust_remote_code,
        chat_template=section.chat_template,
        attn_implementation=section.attn_implementation,
        stop_tokens=section.stop_tokens,
        base=section.path if section.lora else None,  # it may have been moved since the checkpoint was written
    )
    if section.lora and resume_from is None:
        student = with_lora(student, section.lora, path=section.path, seed=recipe.seed, stop_tokens=section.stop_tokens)
    base = Path(section.path)
    if section.lora and base.exists():  # a relative path would be lost as soon as somebody evaluates from elsewhere
        student.module.peft_config["default"].base_model_name_or_path = str(base.resolve())
    if section.gradient_checkpointing:
        student.checkpoint_activations(
            None if section.gradient_checkpointing is True else section.gradient_checkpointing
        )
    student.offloads_activations = section.activation_offload and device.type != "cpu"
    student.passes = recipe.train.passes(device.type, learning=False)
    student.prove_packed()  # so that it says what it cannot before the first step
    student.notes += doubts_of(device, is_chosen=section.device == "auto")
    if device.type == "cuda":
        unproven = prove(device)
        student.notes.append(unproven or f"the loss runs in Triton kernels; on {device} they equal the eager path")
    return student
