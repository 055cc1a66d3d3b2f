"""LoRA adapters: which matrices get one, by a rule that is written down, and a sentence that says which did.

`all-linear` means the matrices of the text model's layers. It leaves out, because they would be trained wrongly or not
at all:
- the head and the embeddings (the loss reads the head as one plain matrix);
- experts: a token trains only those it is sent to, and fused experts are no matrices LoRA could wrap;
- routers: they decide which experts run, and an adapter would move that under the sampler's feet;
- what text does not pass: vision towers, projectors;
- in Mamba mixers everything but `in_proj`: fast kernels read the others' weights past an adapter;
- dense layers and shared experts whose names peft takes for those of the experts (Qwen3-MoE, DeepSeek-V3).
Names listed in `target_modules` are taken at their word, experts and routers too, as long as the model calls them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from opdkit.engines.model import LanguageModel
from opdkit.engines.prove import proof_hidden
from opdkit.errors import UserError
from opdkit.recipe.model_sections import LoraSection

ROUTERS = ("gate", "router", "shared_expert_gate")
EXPERTS = ("experts", "local_experts")
_Reason = str | None  # why `all-linear` leaves a matrix out; None: it does not


def with_lora(
    student: LanguageModel,
    lora: LoraSection,
    *,
    path: str,
    seed: int,
    stop_tokens: Sequence[str | int] | None = None,
) -> LanguageModel:
    """The student with fresh adapters; its `notes` say what they adapt.

    Raises UserError if that is nothing, or something the model never calls.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(student.module, "peft_config"):
        raise UserError(f"model.path = {path} is itself an adapter; remove model.lora to go on training that adapter")
    linear = dict(_matrices(student))
    targets = _targets(lora, linear)
    leaves = sorted({_leaf(name) for name in targets})
    spared = [name for name in linear if name not in targets and _leaf(name) in leaves]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=leaves,
        exclude_modules=spared or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # peft draws the adapters from the global generator; nothing else here reads it
    try:
        module = get_peft_model(student.module, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules = {lora.target_modules!r} does not fit {path}: {error}") from None
    if Path(path).exists():  # a relative path would be lost as soon as somebody evaluates from another folder
        module.peft_config["default"].base_model_name_or_path = str(Path(path).resolve())
    adapted = LanguageModel(
        module,
        student.tokenizer,
        name=student.name,
        chat_template=student.chat_template,
        stop_tokens=stop_tokens,
    )
    adapted.warnings = [*student.warnings, *(w for w in adapted.warnings if w not in student.warnings)]
    _check_called(adapted)
    adapted.notes.append(_sentence(adapted, lora, linear))
    return adapted


def _matrices(student: LanguageModel) -> Iterator[tuple[str, _Reason]]:
    """Every matrix LoRA could adapt, with the reason why `all-linear` leaves it out."""
    module = student.module
    text = {id(part) for part in student.body.modules()}
    head = module.get_output_embeddings()
    taken = _names_of_experts(module)
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | Conv1D) or part is head:
            continue
        parent, _, leaf = name.rpartition(".")
        mixer = module.get_submodule(parent)
        reason: _Reason = None
        if id(part) not in text:
            reason = "outside the text model"
        elif leaf in ROUTERS or "router" in parent.split("."):
            reason = "routers"
        elif _is_expert(name):
            reason = "expert matrices"
        elif hasattr(mixer, "A_log") and hasattr(mixer, "D") and leaf != "in_proj":  # Mamba; gated DeltaNet has no D
            reason = "whose weights Mamba's kernels read past an adapter"
        elif leaf in taken:
            reason = "whose names peft takes for those of the fused experts"
        yield name, reason


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _names_of_experts(module: nn.Module) -> set[str]:
    """Names of matrices that peft puts on the fused experts instead, as transformers 4 had experts of that name.

    Where such names are also those of dense layers and shared experts, peft offers no way to adapt these alone.
    """
    from peft import LoraConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # peft before 0.18 takes names as they are
        return set()
    names = {_leaf(name) for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, module, get_model_conversion_mapping(module))
        except ValueError:  # "... without also targeting ...": one of several that became one
            taken.add(name)
        if config.target_parameters:
            taken.add(name)
    return taken


def _targets(lora: LoraSection, linear: Mapping[str, _Reason]) -> list[str]:
    """Full names of the modules to adapt. Raises UserError for a name that fits none."""
    usual = [name for name, reason in linear.items() if reason is None]
    if lora.target_modules == "all-linear":
        found = {"all-linear": usual}
    elif isinstance(lora.target_modules, str):  # as in peft: a regular expression for the full name
        found = {lora.target_modules: [name for name in linear if _matches(lora.target_modules, name)]}
    else:
        found = {
            target: [name for name in linear if name == target or name.endswith(f".{target}")]
            for target in lora.target_modules
        }
    unknown = [target for target, names in found.items() if not names]
    if unknown:
        choices = ", ".join(sorted({_leaf(name) for name in usual})) or "none of this model's"
        raise UserError(
            f"model.lora.target_modules: {', '.join(unknown)} fits no matrix that LoRA can adapt (fused experts are "
            f"not matrices, and the head must stay plain); choose among: {choices}."
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(
            f"model.lora.target_modules = {pattern!r} is no regular expression ({error}); give names in a list."
        ) from None


def _is_expert(name: str) -> bool:
    return not set(EXPERTS).isdisjoint(name.split("."))


def _check_called(student: LanguageModel) -> None:
    """Raise UserError for an adapter that no token passes. Experts are only asked when a token is sent to them."""
    second = {  # the second matrix begins at zero, so it is the one that has a gradient
        name: parameter
        for name, parameter in student.module.named_parameters()
        if "lora_B" in name and not _is_expert(name)
    }
    with torch.enable_grad():
        loss = proof_hidden(student).float().square().sum()
        gradients = torch.autograd.grad(loss, list(second.values()), allow_unused=True)
    silent = [name.partition(".lora_B")[0] for name, g in zip(second, gradients, strict=True) if g is None]
    if silent:
        raise UserError(
            f"model.lora.target_modules: {len(silent)} of the adapters are never used by the model's forward pass "
            f"(first: {silent[0].removeprefix('base_model.model.')}), so they would not be trained; leave them out."
        )


def _sentence(student: LanguageModel, lora: LoraSection, linear: Mapping[str, _Reason]) -> str:
    """Read from what peft has made, not from what it was asked for."""
    parameters = dict(student.module.named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    base = {name.removeprefix("base_model.model."): p for name, p in parameters.items() if not p.requires_grad}
    total = sum(p.numel() for p in base.values())
    adapted = {name: p for name, p in base.items() if ".base_layer." in name and p.dim() > 1}
    plain_experts = sum(p.numel() for name, p in base.items() if _is_expert(name) and name not in adapted)
    matrices = {name.removesuffix(".weight").replace(".base_layer", "") for name in adapted}
    kinds = Counter(_leaf(name) for name in matrices)
    left = Counter(reason for name, reason in linear.items() if reason is not None and name not in matrices)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    share = sum(p.numel() for p in adapted.values()) / total
    sentence = (
        f"LoRA r = {lora.r} on {len(matrices)} matrices ({counts}) with {share:.1%} of the model's {total:,} "
        f"parameters; {trained:,} are trained"
    )
    if left:
        sentence += f"; left out: {', '.join(f'{n} {reason}' for reason, n in sorted(left.items()))}"
    if plain_experts:
        sentence += f"; experts, {plain_experts / total:.1%} of the parameters, are not adapted"
    return sentence
