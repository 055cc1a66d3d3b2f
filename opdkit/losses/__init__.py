"""Losses: tensors in, one number per token out. No configuration, no model, no logging.

Names load on first use, so that a recipe can be checked without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdkit.losses import weights
    from opdkit.losses.advantage import (
        centred_by_turn,
        group_centred,
        group_return,
        log_mean,
        returns,
        scaled_by_ratio,
        sign_kept,
        teacher_minus_student,
    )
    from opdkit.losses.coefficients import token_coefficients, units
    from opdkit.losses.compare import Comparison, compare_heads
    from opdkit.losses.head import HeadStats, head_loss, head_stats
    from opdkit.losses.heads import Head
    from opdkit.losses.inputs import ViewTokens
    from opdkit.losses.spec import (
        Divergence,
        EntryAdvantage,
        KLEstimate,
        LossSpec,
        NegativeLogLikelihood,
        PolicyGradient,
        Support,
        Target,
        TeacherAdvantage,
    )
    from opdkit.losses.sums import HeadOutput
    from opdkit.losses.target import combined
    from opdkit.losses.terms import Term

_HOME = {
    "centred_by_turn": "advantage",
    "group_centred": "advantage",
    "group_return": "advantage",
    "log_mean": "advantage",
    "returns": "advantage",
    "scaled_by_ratio": "advantage",
    "sign_kept": "advantage",
    "teacher_minus_student": "advantage",
    "token_coefficients": "coefficients",
    "units": "coefficients",
    "Comparison": "compare",
    "compare_heads": "compare",
    "Head": "heads",
    "HeadOutput": "sums",
    "HeadStats": "head",
    "ViewTokens": "inputs",
    "head_loss": "head",
    "head_stats": "head",
    "Divergence": "spec",
    "EntryAdvantage": "spec",
    "KLEstimate": "spec",
    "LossSpec": "spec",
    "NegativeLogLikelihood": "spec",
    "PolicyGradient": "spec",
    "Support": "spec",
    "Target": "spec",
    "TeacherAdvantage": "spec",
    "Term": "terms",
    "combined": "target",
}

__all__ = [
    "Comparison",
    "Divergence",
    "EntryAdvantage",
    "Head",
    "HeadOutput",
    "HeadStats",
    "KLEstimate",
    "LossSpec",
    "NegativeLogLikelihood",
    "PolicyGradient",
    "Support",
    "Target",
    "TeacherAdvantage",
    "Term",
    "ViewTokens",
    "centred_by_turn",
    "combined",
    "compare_heads",
    "group_centred",
    "group_return",
    "head_loss",
    "head_stats",
    "log_mean",
    "returns",
    "scaled_by_ratio",
    "sign_kept",
    "teacher_minus_student",
    "token_coefficients",
    "units",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "weights":
        return importlib.import_module(f"{__name__}.weights")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
