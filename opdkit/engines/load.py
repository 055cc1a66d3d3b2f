"""From a folder or hub name to a module and its tokenizer; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opdkit.errors import UserError


def load_checkpoint(
    path: str, *, dtype: torch.dtype | str, trust_remote_code: bool, attn_implementation: str | None
) -> tuple[Any, Any, list[str]]:
    """(module, tokenizer, sentences to be shown) of a checkpoint folder, an adapter folder (base plus adapter, never
    merged) or a hub name.

    Raises UserError if there is no such model, no tokenizer, or weights are missing: transformers would fill them with
    random numbers and carry on.
    """
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    return _load(path, options)


def _load(path: str, options: Mapping[str, Any]) -> tuple[Any, Any, list[str]]:
    folder = Path(path)
    _check_folder(path)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, options)
    module, said = _load_module(path, options)
    return module, load_tokenizer(path, options["trust_remote_code"]), said


def _load_module(path: str, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The module, and what must be said of it."""
    with _one_sentence(f"{path} cannot be loaded as a causal language model"):
        auto = _auto_class(path, options["trust_remote_code"])
        module, info = auto.from_pretrained(path, **options, output_loading_info=True)
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(
            f"the checkpoint {path} lacks {len(missing)} of the model's weights (first: {missing[0]}), which would be "
            "random numbers; use a complete checkpoint, or one that was saved with its language-model head."
        )
    if not unused:
        return module, []
    return module, [
        f"{path} holds {len(unused)} weights that a {type(module).__name__} does not have (first: {unused[0]}); they "
        "are not read, and checkpoints of this run will not have them"
    ]


def _auto_class(path: str, trust_remote_code: bool) -> Any:
    """A checkpoint of a model that reads images too is loaded whole.

    The text-only class of its type would drop the rest in silence, and what is trained could not take its place.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    text, whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = config.model_type
    if kind in whole and (kind not in text or whole[kind] in (config.architectures or ())):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """Raises UserError if there is none."""
    from transformers import AutoTokenizer

    with _one_sentence(f"{path} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(
        set(tokenizer.all_special_ids)
    ):  # transformers makes an empty one where the files are gone
        raise UserError(
            f"{path} has no tokenizer files; copy the model's tokenizer.json and tokenizer_config.json there."
        )
    return tokenizer


def load_generation_config(path: str, trust_remote_code: bool = False) -> Any:
    """What a checkpoint says ends its answers: its generation config or, as transformers does, its config."""
    from transformers import AutoConfig, GenerationConfig

    with _one_sentence(f"{path} has no configuration that can be loaded"):
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            return GenerationConfig.from_model_config(config)


def load_words(path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """(tokenizer, generation config) that `load_checkpoint` would find at the same path. No weight is read."""
    folder = Path(path)
    _check_folder(path)
    if not (folder / "adapter_config.json").is_file():
        return load_tokenizer(path, trust_remote_code), load_generation_config(path, trust_remote_code)
    tokenizer, generation = None, None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(path, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        generation = load_generation_config(path)
    if tokenizer is None or generation is None:
        of_base = load_words(_base_of(folder), trust_remote_code)
        tokenizer, generation = tokenizer or of_base[0], generation or of_base[1]
    return tokenizer, generation


def _base_of(folder: Path) -> str:
    from peft import PeftConfig

    with _one_sentence(f"{folder} holds no readable adapter"):
        base_path = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_path:
        raise UserError(f"{folder}/adapter_config.json names no base model; set base_model_name_or_path in it.")
    return str(base_path)


def _check_folder(path: str) -> None:
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"there is no model folder {path}; give a folder with a config.json, or a hub name.")


def _load_adapter(folder: Path, options: Mapping[str, Any]) -> tuple[Any, Any, list[str]]:
    """Base and adapter side by side, the adapter trainable. The tokenizer is the adapter folder's own if it has one."""
    from peft import PeftModel

    base_path = _base_of(folder)
    base, tokenizer, said = _load(base_path, options)
    with _one_sentence(f"the adapter {folder} does not fit its base model {base_path}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # peft warns and keeps its random numbers
        module = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), options["trust_remote_code"])
    if (folder / "generation_config.json").is_file():
        base.generation_config = load_generation_config(str(folder))
    return module, tokenizer, said


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds for a bad folder; every one of them is about the input
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".:")
        raise UserError(f"{what}: {reason}; check the path and the files in it.") from error
