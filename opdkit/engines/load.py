"""From a folder or hub name to a module and its tokenizer; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opdkit.engines.devices import refused
from opdkit.engines.quantized import quantization_config
from opdkit.engines.rope import max_length
from opdkit.errors import UserError
from opdkit.hub import asked_once, may_be_on_hub, revision_of


def load_checkpoint(
    path: str,
    *,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    attn_implementation: str | None,
    base: str | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any, list[str]]:
    """(module, tokenizer, sentences to be shown) of a checkpoint folder, an adapter folder (base plus adapter, never
    merged) or a hub name.

    base: where an adapter's base model is, if not where its folder says.

    Raises UserError if there is no such model, no tokenizer, or weights are missing: transformers would fill them with
    random numbers and carry on.
    """
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    return _load(path, options, base)


def _load(path: str, options: Mapping[str, Any], base: str | None = None) -> tuple[Any, Any, list[str]]:
    check_model_path(path)
    folder = Path(path)
    with _found(path), quiet_libraries():
        if (folder / "adapter_config.json").is_file():
            return _load_adapter(folder, options, base)
        module, said = _load_module(path, options)
        return module, _load_tokenizer(path, options["trust_remote_code"]), said


def check_model_path(path: str) -> None:
    """Raises UserError for what can be neither a model's folder nor a hub name. Loads nothing and asks nobody."""
    try:
        is_there, is_folder = os.path.lexists(path), Path(path).is_dir()
    except (OSError, ValueError):  # too long a name, a NUL in it
        is_there = is_folder = False
    if is_there and path and not is_folder:
        raise UserError(f"the model {path[:200]} is no folder; give a folder with a config.json, or a hub name.")
    if not path or not (is_there or may_be_on_hub(path)):
        raise UserError(
            f"there is no such folder {path[:200]!r}, and it is no hub name; give a model's folder, with a config.json "
            "in it, or a name on the hub (owner/name)."
        )


@contextmanager
def _found(path: str) -> Iterator[None]:
    """The hub is asked once where `path` is no folder; the refusal then says that there is none, and what it said."""
    if Path(path).exists():
        yield
        return
    with asked_once(path, "model", revision_of(path).get("revision")) as reason:
        try:
            yield
        except UserError as error:
            if reason is None:
                raise
            raise UserError(
                f"there is no such folder {path}, and no model of that name could be loaded from the hub ({reason}); "
                "check the path, or without a connection copy the model here and name its folder."
            ) from error


def _load_module(path: str, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The module, and what must be said of it."""
    with one_sentence(f"{path} cannot be loaded as a causal language model"):
        auto = auto_class(path, options["trust_remote_code"])
        module, info = auto.from_pretrained(
            path, **options, **revision_of(path), output_loading_info=True, ignore_mismatched_sizes=True
        )
    if misfits := sorted(info["mismatched_keys"]):
        name, found, wanted = misfits[0]
        raise UserError(
            f"the checkpoint {path} does not fit its config.json: {len(misfits)} of its weights have other sizes "
            f"(first: {name} is {list(found)}, and should be {list(wanted)}); use the config.json it was saved with."
        )
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


def auto_class(path: str, trust_remote_code: bool) -> Any:
    """A checkpoint of a model that reads images too is loaded whole.

    The text-only class of its type would drop the rest in silence, and what is trained could not take its place.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path))
    text, whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = config.model_type
    if kind in whole and (kind not in text or whole[kind] in (config.architectures or ())):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What transformers prints while it loads (bars, and a table of what is wrong with a checkpoint, which we say in a
    sentence) is left out. Bars of downloads stay: they take long."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as theirs

    level, has_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    has_hub_bars = not are_progress_bars_disabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    if has_hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if has_bars:
            theirs.enable_progress_bar()


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """Of a folder or a hub name. Raises UserError if there is none."""
    check_model_path(path)
    with _found(path), quiet_libraries():
        return _load_tokenizer(path, trust_remote_code)


def _load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with one_sentence(f"{path} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path))
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

    with one_sentence(f"{path} has no configuration that can be loaded"):
        try:
            return GenerationConfig.from_pretrained(path, **revision_of(path))
        except OSError:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path))
            return GenerationConfig.from_model_config(config)


def load_words(path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """(tokenizer, generation config) that `load_checkpoint` would find at the same path. No weight is read."""
    check_model_path(path)
    folder = Path(path)
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


def load_num_rows(path: str, trust_remote_code: bool) -> int | None:
    """How many ids the model at a path has a row for, by its config; None: the config does not say."""
    from transformers import AutoConfig

    if (Path(path) / "adapter_config.json").is_file():
        return load_num_rows(_base_of(Path(path)), trust_remote_code)
    with one_sentence(f"{path} has no configuration that can be loaded"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path))
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def load_max_positions(path: str, trust_remote_code: bool) -> int | None:
    """As `CausalModel.max_positions`, by the config alone."""
    from transformers import AutoConfig

    if base := adapter_base(Path(path)):
        return load_max_positions(base, trust_remote_code)
    with one_sentence(f"{path} has no configuration that can be loaded"):
        return max_length(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path)))


def adapter_base(folder: Path) -> str | None:
    """The base model of an adapter's folder; None: it is no adapter."""
    return _base_of(folder) if (folder / "adapter_config.json").is_file() else None


def _base_of(folder: Path) -> str:
    from peft import PeftConfig

    with one_sentence(f"{folder} holds no readable adapter"):
        base_path = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_path:
        raise UserError(f"{folder}/adapter_config.json names no base model; set base_model_name_or_path in it.")
    return str(base_path)


def _load_adapter(folder: Path, options: Mapping[str, Any], base: str | None) -> tuple[Any, Any, list[str]]:
    """Base and adapter side by side, the adapter trainable. The tokenizer is the adapter folder's own if it has one."""
    from peft import PeftModel

    base_path = base or _base_of(folder)
    module, tokenizer, said = _load(base_path, options)
    if (folder / "generation_config.json").is_file():
        module.generation_config = load_generation_config(str(folder))
    with one_sentence(f"the adapter {folder} does not fit its base model {base_path}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # peft warns and keeps its random numbers
        module = PeftModel.from_pretrained(module, str(folder), is_trainable=True)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(str(folder), options["trust_remote_code"])
    return module, tokenizer, said


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds for a bad folder; every one of them is about the input
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".:")
        raise UserError(f"{what}: {reason}; check the path and the files in it.") from error


def pick_device(name: str, key: str = "model.device") -> torch.device:
    """ "auto" is CUDA if it is there, else the CPU. Raises UserError for a device that this machine does not have, or
    that opdkit does not run on (`devices.py`)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if (why := refused(device)) is not None:
            raise UserError(f'{key} = "{name[:80]}" is refused: {why}; use "auto" or "cpu"')
        torch.ones(1, device=device, dtype=torch.float64).item()  # "meta" makes tensors, and keeps no numbers
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'{key} = "{name[:80]}" is not available here ({reason}); use "auto" or "cpu"') from None
    return device


def model_digest(folder: Path) -> str | None:
    """Of what makes a local model's answers: weights, config, tokenizer and template, and an adapter's base.

    Of a weight file: its size and a MiB at start, middle and end. Training moves every weight, so this tells a
    retrained model at the same path without reading it whole. None for a hub id.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - (1 << 20))) if path.suffix == ".safetensors" else (0,):
                file.seek(start)
                digest.update(file.read(1 << 20) if path.suffix == ".safetensors" else file.read())
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        try:
            base = dict(json.loads(adapter.read_text(encoding="utf-8"))).get("base_model_name_or_path")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{adapter} cannot be read ({error}); copy the adapter's folder again") from None
        digest.update(str(model_digest(Path(base)) if isinstance(base, str) and base else None).encode())
    return digest.hexdigest()
