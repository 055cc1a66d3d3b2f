"""Every method: one paper, one small file, one row in this table."""

from opdkit.methods.base import Method, PlanInputs
from opdkit.methods.grpo import GRPO
from opdkit.methods.opd import OPD
from opdkit.methods.opsd import OPSD
from opdkit.methods.sft import SFT

METHODS: dict[str, type[Method]] = {
    "opd": OPD,
    "opsd": OPSD,
    "grpo": GRPO,
    "sft": SFT,
}

__all__ = ["METHODS", "Method", "PlanInputs"]
