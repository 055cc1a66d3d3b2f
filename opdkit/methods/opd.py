"""On-policy distillation from another model.

The student answers, the teacher reads the same problem, and at every token of the student's answer the two next-token
distributions are compared:

    L = 1/N sum over rows, sum over tokens  D(student, teacher)          N = counted answer tokens of the whole batch

D is any divergence on any support; by default reverse_kl = KL(student || teacher) on the full vocabulary, exact given
the states. `support = "sampled"` is the one-sample form, which needs only the teacher's log-prob of the sampled token:

    L = -1/N sum A log p(y),   A = log q(y) - log p(y) held constant

No gradient flows through the sampling of the answer in either form: there is no return-to-go.

Sources: GKD (arXiv:2306.13649, eq. 4 with on-policy data only). The optimisation settings are those of Rethinking
On-Policy Distillation (arXiv:2604.13016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from opdkit.methods.base import Distillation


class OPD(Distillation):
    name: Literal["opd"] = "opd"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "context": {"kind": "none"},
        "sampling": {"group_size": 4, "temperature": 1.0, "max_answer_tokens": 7168},
        "train": {"problems_per_step": 64, "lr": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }
