"""The last norm and the head of a checkpoint, without the layers before them: what makes log-probs of hidden states.

A server that hands out the states behind its last layer leaves these two to us. They are read from the checkpoint's own
files; whether they are what the server has is proved by the numbers (`engines/servers/probe.py`).

Letters: T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opdkit.engines.anatomy import logit_transform, text_body
from opdkit.engines.load import auto_class, check_model_path, one_sentence, quiet_libraries
from opdkit.errors import UserError
from opdkit.hub import revision_of
from opdkit.losses import Head

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")


class OutputHead:
    """Of a folder or hub name. Raises UserError where its parts are not where models have them."""

    def __init__(self, path: str, *, device: torch.device, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig

        check_model_path(path)
        with one_sentence(f"{path} cannot be read as a causal language model"), quiet_libraries():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **revision_of(path))
            with torch.device("meta"):
                module = auto_class(path, trust_remote_code).from_config(config, trust_remote_code=trust_remote_code)
        body = text_body(module, path)
        name = next((name for name in NORMS if isinstance(getattr(body, name, None), nn.Module)), None)
        head = module.get_output_embeddings()
        if name is None or head is None:
            raise _unreadable(path, "its last norm is not where opdkit looks for it")
        self.path, self.config = path, config
        self.norm: nn.Module = getattr(body, name)
        self._scale, self._softcap = logit_transform(config)
        inputs = module.get_input_embeddings() if config.get_text_config().tie_word_embeddings else None
        wanted = {**_named(module, self.norm, "norm."), **_named(module, head, "head.", inputs)}
        found = _read(path, wanted)
        self.norm.to_empty(device=device)
        own = {key.removeprefix("norm."): value for key, value in found.items() if key.startswith("norm.")}
        self.norm.load_state_dict({**self.norm.state_dict(), **own})
        self.norm.requires_grad_(False)
        self.weight_VH, self.bias_V = found["head.weight"].to(device), found.get("head.bias")
        self._device = device

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def to(self, dtype: torch.dtype) -> None:
        """As the server computes."""
        self.norm.to(dtype)
        self.weight_VH = self.weight_VH.to(dtype)
        self.bias_V = None if self.bias_V is None else self.bias_V.to(self._device, dtype)

    @torch.no_grad()
    def states(self, behind_last_layer_TH: Tensor) -> Tensor:
        """[T, H] as the head takes them, in host memory."""
        normed_TH: Tensor = self.norm(behind_last_layer_TH.to(self._device))
        return normed_TH.cpu()

    def head(self, num_tokens: int, absent_ids: Sequence[int] = ()) -> Head:
        return Head(
            weight_VH=self.weight_VH,
            bias_V=self.bias_V,
            num_tokens=num_tokens,
            absent_ids=torch.tensor(absent_ids, device=self._device) if absent_ids else None,
            logit_scale=self._scale,
            softcap=self._softcap,
        )


def _named(module: nn.Module, part: nn.Module, prefix: str, tied: nn.Module | None = None) -> dict[str, list[str]]:
    """{our name of a parameter of `part`: the names that a checkpoint may have for it}"""
    full: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        full.setdefault(id(parameter), []).append(name)
    wanted = {prefix + leaf: full[id(parameter)] for leaf, parameter in part.named_parameters()}
    if tied is not None:
        wanted[prefix + "weight"] = [*wanted[prefix + "weight"], *full[id(tied.weight)]]
    return wanted


def _read(path: str, wanted: dict[str, list[str]]) -> dict[str, Tensor]:
    files = _files_of(path)
    found: dict[str, Tensor] = {}
    for key, names in wanted.items():
        name = next((name for name in names if name in files), None)
        if name is None:
            raise _unreadable(path, f"its files have no {names[0]}")
        try:
            with safe_open(files[name], framework="pt") as file:
                found[key] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{files[name]} cannot be read ({error}); copy the model again") from None
    return found


def _files_of(path: str) -> dict[str, Path]:
    """{parameter: the .safetensors file that holds it}. Of a hub name only these files are fetched."""
    from transformers.utils import cached_file

    def there(name: str) -> Path | None:
        with one_sentence(f"{path} has no weights that can be read"):
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **revision_of(path))
        return None if found is None else Path(found)

    index = there("model.safetensors.index.json")
    if index is not None:
        try:
            names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} cannot be read ({error}); copy the model again") from None
        return {name: file for name, part in names.items() if (file := there(str(part))) is not None}
    single = there("model.safetensors")
    if single is None:
        raise _unreadable(path, "it has no model.safetensors")
    with one_sentence(f"{single} cannot be read"), safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _unreadable(path: str, why: str) -> UserError:
    return UserError(
        f"the last norm and the head of {path} cannot be read ({why}), and a server's hidden states are nothing "
        'without them; use teacher.payload = "topk"'
    )
