"""The size of any model that transformers can build, from its config.json alone.

The model is made of fake tensors, which have shapes and no numbers: parameters are counted on it, and what a pass
allocates is followed operation by operation, forward and backward. A model of 30 billion parameters takes no memory.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opdkit.cost.size import ModelSize, Pass
from opdkit.engines.anatomy import text_body, unread_parts
from opdkit.engines.load import quiet_libraries
from opdkit.engines.sampling.cache import KEYS, STATES
from opdkit.errors import UserError

TOKENS = 2039  # of a pass that is followed; a prime, so that no activation has the shape of a weight
STATE_TOKENS = 67  # of a model with states, which goes from token to token
LORA_RANK = 64  # the recipe's default; an adapter's own activations are few


def size_from_config(path: Path, *, attention: str | None = None, trust_remote_code: bool = False) -> ModelSize:
    """path: a config.json, or a folder that has one. attention: as model.attn_implementation.

    Raises UserError where there is none, or transformers cannot build a causal language model from it.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no readable config.json ({error}); give a model's config.json") from None
    try:
        with quiet_libraries(), FakeTensorMode(), _few_words():
            config = AutoConfig.from_pretrained(str(file), trust_remote_code=trust_remote_code)
            return _size(config, None if attention and "flash" in attention else attention)
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds for a config they cannot build
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(
            f"no causal language model can be built from {file} ({reason[:200]}); check it with the transformers "
            "release that the model asks for"
        ) from error


def _size(config: Any, attention: str | None) -> ModelSize:
    base = _built(config, torch.bfloat16, attention)
    body = text_body(base, "the model of this config")
    unread = unread_parts(base, body)
    num_unread = sum(p.numel() for part in unread.values() for p in part.parameters())
    text = base.config.get_text_config(decoder=True)
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    outer = {id(head), id(embedding)}
    layers = [p for p in body.parameters() if id(p) not in outer]
    matrices = sum(p.numel() for p in layers if p.ndim >= 2)
    experts = sum(p.numel() for n, p in body.named_parameters() if ".experts." in n)
    attended, cached, window = _attention(text, body)
    return ModelSize(
        parameters=sum(p.numel() for p in base.parameters()) - num_unread,
        unread=num_unread,
        vocabulary=head.shape[0],
        hidden=head.shape[1],
        layers=text.num_hidden_layers,
        tied=head is embedding,
        active=sum(p.numel() for p in layers) - experts + round(experts * _share_of_experts(text)),
        matrices=matrices,
        adapted=sum(m.in_features + m.out_features for m in _adapted(body)),
        attention=attended[0],
        window_attention=attended[1],
        **cached,
        window=window,
        passes=_passes(config, attention),
    )


def _built(config: Any, dtype: torch.dtype, attention: str | None) -> Any:
    config = copy.deepcopy(config)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention or _UNMASKED)
    except ValueError:  # no attention of its own to choose
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _unmasked(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **{**how, "is_causal": True})


# Rows are scored and trained without a mask (`CausalModel.hidden`), but transformers makes one for fake tensors.
_UNMASKED = "opdkit_unmasked"
ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, _unmasked)
ALL_MASK_ATTENTION_FUNCTIONS.register(_UNMASKED, lambda *args, **how: None)


def _share_of_experts(text: Any) -> float:
    """Of all experts of a layer, those that a token is sent to."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", None)
    return chosen / total if total and chosen else 1.0


def _adapted(body: nn.Module) -> Iterator[nn.Linear]:
    """As `training.models.lora` chooses: the layers' matrices without routers and experts."""
    for name, part in body.named_modules():
        words = name.split(".")
        if isinstance(part, nn.Linear) and not {"gate", "router", "experts", "shared_expert_gate"}.intersection(words):
            yield part


def _attention(text: Any, body: nn.Module) -> tuple[tuple[int, int], dict[str, int], int]:
    """((query widths of the layers that see all, of those with a window), what is cached, the window)."""
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    cache = DynamicCache(config=text)
    names = inspect.signature(body.forward).parameters
    name = next(name for name in (KEYS, STATES) if name in names)
    with torch.no_grad():
        body(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True, **{name: cache})
    found = {"cached": 0, "window_cached": 0, "state": 0}
    attended, window = [0, 0], 0
    for layer in cache.layers:
        numbers = _numbers(layer, "keys", "values") // 2
        if isinstance(layer, DynamicSlidingWindowLayer):
            found["window_cached"] += numbers
            attended[1] += heads * width
            window = int(text.sliding_window or 0)
        elif isinstance(layer, DynamicLayer):
            found["cached"] += numbers
            attended[0] += heads * width
        else:
            found["state"] += _numbers(layer, "conv_states", "recurrent_states")
    return (attended[0], attended[1]), found, window


def _has_states(body: nn.Module) -> bool:
    layers = DynamicCache(config=body.config).layers
    return any(not isinstance(layer, DynamicLayer) for layer in layers)


def _numbers(layer: Any, *names: str) -> int:
    tensors = [getattr(layer, name, None) for name in names]
    return sum(one.numel() for one in tensors if isinstance(one, Tensor))


def _passes(config: Any, attention: str | None) -> dict[str, Pass]:
    """The layers repeat themselves: a model of few of them is followed, and one of twice as many."""
    total = config.get_text_config(decoder=True).num_hidden_layers
    few, more = _few_layers(config.get_text_config(decoder=True))

    def passes(dtype: torch.dtype, lora: bool = False) -> Pass:
        found = []
        for number in dict.fromkeys((few, more)):
            model = _built(_with_layers(config, number), dtype, attention)
            found.append(_pass(_with_lora(model) if lora else model))
        first, last = found[0], found[-1]
        times = (total - few) / (more - few) if more > few else 0

        def grown(name: str) -> float:
            return getattr(first, name) + times * (getattr(last, name) - getattr(first, name))

        return replace(last, kept=grown("kept"), kept_checkpointed=grown("kept_checkpointed"))

    found = {"bfloat16": passes(torch.bfloat16), "bfloat16+lora": passes(torch.bfloat16, lora=True)}
    try:
        found["float32"] = passes(torch.float32)
    except RuntimeError:  # the grouped products of experts are made for bfloat16 alone: twice as wide in float32
        found["float32"] = _twice(found["bfloat16"])
    return found


def _few_layers(text: Any) -> tuple[int, int]:
    """(as many layers as repeat, twice as many), behind those that do not."""
    total = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ["same"] * total)
    period = next(n for n in range(1, total + 1) if all(kinds[i] == kinds[i % n] for i in range(total)))
    others = getattr(text, "first_k_dense_replace", 0) or 0
    return min(total, others + period), min(total, others + 2 * period)


def _with_layers(config: Any, number: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = number
    if "layer_types" in vars(text):  # of some it follows from the number
        text.layer_types = text.layer_types[:number]
    return config


def _twice(one: Pass) -> Pass:
    return Pass(**{name: 2 * getattr(one, name) for name in one.__slots__})


class _Adapted(nn.Module):
    """A matrix under a LoRA adapter in float32, as peft computes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, LORA_RANK, bias=False, dtype=torch.float32)
        self.up = nn.Linear(LORA_RANK, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x_BTI: Tensor) -> Tensor:
        result_BTO = self.base(x_BTI)
        added_BTO = self.up(self.down(x_BTI.to(torch.float32))) * 2.0
        return (result_BTO + added_BTO).to(result_BTO.dtype)


def _with_lora(model: Any) -> Any:
    """Adapters over a frozen base. peft itself moves modules about, which fake tensors do not bear."""
    body = text_body(model, "the model of this config")
    model.requires_grad_(False)
    chosen = {id(part) for part in _adapted(body)}
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in chosen:
                setattr(parent, name, _Adapted(child))
    return model


def _pass(model: Any) -> Pass:
    body = text_body(model, "the model of this config")
    for parameter in model.parameters():
        if parameter.requires_grad:  # a gradient is counted where it stays, and not here
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    _, read = _bytes(body, model, learns=False)
    kept, most = _bytes(body, model)
    again, most_again = kept, most
    if getattr(model, "supports_gradient_checkpointing", False):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
        again, most_again = _bytes(body, model)
    return Pass(
        kept=kept, beyond=most - kept, kept_checkpointed=again, beyond_checkpointed=most_again - again, read=read
    )


def _bytes(body: nn.Module, model: nn.Module, learns: bool = True) -> tuple[float, float]:
    """For each token: (what is kept behind a forward pass, the peak of forward and backward)."""
    num = STATE_TOKENS if _has_states(body) else TOKENS
    ids_BT = torch.zeros(1, num, dtype=torch.long)
    with Live(model) as live, torch.set_grad_enabled(learns):
        hidden_BTH = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        kept = live.bytes
        if learns:
            hidden_BTH.backward(torch.ones_like(hidden_BTH))
    return kept / num, live.peak / num


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, while they live; not those of `model`'s own, and not what has
    the shape of its weights: copies and gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, Any] = {}
        self._shapes = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
        self._shapes |= {shape[::-1] for shape in self._shapes}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._known[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.shape not in self._shapes:
                self._add(one.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, self._forgetting(key, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _forgetting(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.bytes -= size
            self._known.pop(key, None)

        return forget


@contextmanager
def _few_words() -> Iterator[None]:
    """transformers warns of configs that it completes, and torch prints the whole story of a failed operation."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.disabled = before
