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
    path: str,
    *,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    attn_implementation: str | None,
    base: str | None = None,
) -> tuple[Any, Any]:
    """(module, tokenizer) of a checkpoint folder, an adapter folder (base plus adapter, never merged) or a hub name.

    base: where an adapter's base model is, if not where its folder says.

    Raises UserError if there is no such model, no tokenizer, or weights are missing: transformers would fill them with
    random numbers and carry on.
    """
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    return _load(path, options, base)


def _load(path: str, options: Mapping[str, Any], base: str | None = None) -> tuple[Any, Any]:
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"there is no model folder {path}; give a folder with a config.json, or a hub name.")
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, options, base)
    return _load_module(path, options), load_tokenizer(path, options["trust_remote_code"])


def _load_module(path: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    with _one_sentence(f"{path} cannot be loaded as a causal language model"):
        module, info = AutoModelForCausalLM.from_pretrained(path, **options, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the checkpoint {path} lacks {len(missing)} of the model's weights (first: {missing[0]}), which would be "
            "random numbers; use a complete checkpoint, or one that was saved with its language-model head."
        )
    return module


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


def _load_adapter(folder: Path, options: Mapping[str, Any], base: str | None) -> tuple[Any, Any]:
    """Base and adapter side by side, the adapter trainable. The tokenizer is the adapter folder's own if it has one."""
    from peft import PeftConfig, PeftModel

    with _one_sentence(f"{folder} holds no readable adapter"):
        base_path = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_path:
        raise UserError(f"{folder}/adapter_config.json names no base model; set base_model_name_or_path in it.")
    module, tokenizer = _load(base_path, options)
    with _one_sentence(f"the adapter {folder} does not fit its base model {base_path}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # peft warns and keeps its random numbers
        module = PeftModel.from_pretrained(module, str(folder), is_trainable=True)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), options["trust_remote_code"])
    return module, tokenizer


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds for a bad folder; every one of them is about the input
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".:")
        raise UserError(f"{what}: {reason}; check the path and the files in it.") from error
