"""What a model's size says of its costs. Numbers, not tensors; of models that recipes name they stand in `models.toml`.

"Numbers" are counts of parameters or elements; they become bytes where the dtype is known.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("models.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Bytes for each token of a pass over the transformer, the head not among them.

    kept      from the forward to the backward pass: what autograd saves
    beyond    the most that is there besides during forward and backward (of the layer that is at work)
    read      the most of a pass without gradient
    """

    kept: float
    beyond: float
    kept_checkpointed: (
        float  # the same two with gradient checkpointing: one state a layer, and a layer that is run again
    )
    beyond_checkpointed: float
    read: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Of a decoder-only language model, its text part unless it says otherwise."""

    parameters: int  # all that text passes; a head that is tied to the embedding counts once
    unread: int = 0  # parameters beside them (vision towers): loaded, never trained
    vocabulary: int  # rows of the head
    hidden: int
    layers: int
    tied: bool  # head and input embedding are one matrix
    active: int  # parameters of the layers that a token multiplies; of experts those it is sent to
    matrices: int  # parameters of the layers' matrices: what Muon moves
    adapted: int  # inputs plus outputs of every matrix that LoRA's "all-linear" adapts
    attention: int  # layers * heads * width of a head, of the layers that see every earlier token
    cached: int  # keys and values of a token in those layers
    window: int = 0  # positions that the other layers see, if there are such
    window_attention: int = 0
    window_cached: int = 0
    state: int = 0  # numbers that a row keeps whatever its length (state-space layers)
    passes: Mapping[str, Pass]  # by dtype of the computation; "bfloat16+lora" of a base under adapters in float32

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    def cached_in(self, positions: float) -> float:
        """Numbers that a row of so many positions keeps in the sampler's cache."""
        return positions * self.cached + min(positions, self.window) * self.window_cached + self.state

    def attended(self, positions: float) -> float:
        """Products of queries and keys of the last of so many positions, times 2 for the values."""
        return 2 * (positions * self.attention + min(positions, self.window) * self.window_attention)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every matrix."""
        return self.adapted * rank

    def as_dict(self) -> dict[str, Any]:
        """As `models.toml` has it."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "passes"}
        own = {name: value for name, value in own.items() if value != 0 or isinstance(value, bool)}
        return own | {"passes": {dtype: _figures(one) for dtype, one in self.passes.items()}}

    @staticmethod
    def of(table: Mapping[str, Any]) -> ModelSize:
        passes = {dtype: Pass(**one) for dtype, one in table["passes"].items()}
        return ModelSize(**{key: value for key, value in table.items() if key != "passes"}, passes=passes)


def _figures(one: Pass) -> dict[str, float]:
    return {name: getattr(one, name) for name in one.__slots__}


@cache
def known_sizes() -> Mapping[str, ModelSize]:
    """{hub name: size} of the models that shipped recipes name. Made by `python benchmarks/plan_models.py`."""
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    same = {name: table["same_as"] for name, table in tables.items() if "same_as" in table}
    sizes = {name: ModelSize.of(table) for name, table in tables.items() if name not in same}
    return sizes | {name: sizes[other] for name, other in same.items()}
