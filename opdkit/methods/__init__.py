"""Every method: one paper, one small file, one row in this table."""

from opdkit.methods.base import Method
from opdkit.methods.dopd import DOPD
from opdkit.methods.dpo import DPO
from opdkit.methods.eopd import EOPD
from opdkit.methods.exopd import ExOPD
from opdkit.methods.grpo import GRPO
from opdkit.methods.grpo_opd import GRPOOPD
from opdkit.methods.i_sdpo import ISDPO
from opdkit.methods.mopd import MOPD
from opdkit.methods.opd import OPD
from opdkit.methods.opsa import OPSA
from opdkit.methods.opsd import OPSD
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.pw_opsd import PWOPSD
from opdkit.methods.reopold import Reopold
from opdkit.methods.rlcsd import RLCSD
from opdkit.methods.rlsd import RLSD
from opdkit.methods.sdpo import SDPO
from opdkit.methods.sft import SFT
from opdkit.methods.simpo import SimPO
from opdkit.methods.sr_opsd import SROPSD
from opdkit.methods.srpo import SRPO
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
    "exopd": ExOPD,
    "dopd": DOPD,
    "sr_opsd": SROPSD,
    "grpo": GRPO,
    "grpo_opd": GRPOOPD,
    "rlsd": RLSD,
    "rlcsd": RLCSD,
    "srpo": SRPO,
    "i_sdpo": ISDPO,
    "opsa": OPSA,
    "sft": SFT,
    "dpo": DPO,
    "simpo": SimPO,
    "verified_sft": VerifiedSFT,
}

__all__ = ["METHODS", "Method", "PlanInputs"]
