"""Weights of a frozen model in 8 or 4 bits, through transformers' own configurations of torchao and bitsandbytes.

Only the matrices inside the layers are quantised; the embedding and the head stay as they are, since the loss reads the
head itself. Weight-only: a token's numbers do not depend on the rows beside it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from opdkit.errors import UserError

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def missing_package(kind: str) -> str | None:
    """A sentence where this machine lacks what a kind needs."""
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is not None:
        return None
    return f'quantization = "{kind}" needs {package}, which is not installed; pip install "opdkit[quantized]"'


def quantization_config(kind: str, dtype: Any) -> Any:
    """For `from_pretrained`. dtype: of the computation. Raises UserError where the package is missing."""
    if (sentence := missing_package(kind)) is not None:
        raise UserError(sentence)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig())
