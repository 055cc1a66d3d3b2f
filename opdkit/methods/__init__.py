"""Every method: one paper, one small file, one row in this table."""

from opdkit.methods.base import Method
from opdkit.methods.dpo import DPO
from opdkit.methods.eopd import EOPD
from opdkit.methods.grpo import GRPO
from opdkit.methods.grpo_opd import GRPOOPD
from opdkit.methods.mopd import MOPD
from opdkit.methods.opd import OPD
from opdkit.methods.opsd import OPSD
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.pw_opsd import PWOPSD
from opdkit.methods.reopold import Reopold
from opdkit.methods.sdpo import SDPO
from opdkit.methods.sft import SFT
from opdkit.methods.simpo import SimPO
from opdkit.methods.topk_opd import TopkOPD
from opdkit.methods.verified_sft import VerifiedSFT

METHODS: dict[str, type[Method]] = {
    "opd": OPD,
    "topk_opd": TopkOPD,
    "opsd": OPSD,
    "pw_opsd": PWOPSD,
    "eopd": EOPD,
    "reopold": Reopold,
    "sdpo": SDPO,
    "mopd": MOPD,
    "grpo": GRPO,
    "grpo_opd": GRPOOPD,
    "sft": SFT,
    "dpo": DPO,
    "simpo": SimPO,
    "verified_sft": VerifiedSFT,
}

__all__ = ["METHODS", "Method", "PlanInputs"]
