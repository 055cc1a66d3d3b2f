"""Contrastive self-distillation from siblings: the teacher reads two right answers and a wrong one.

The loss is SDPO's (`sdpo.py`); what differs is the context, two successes and a known failure for every rollout, also
for one that succeeded itself:

    teacher = p_average( . | problem, two right siblings, a wrong sibling, answer so far)

`context.slots = ["success", "success"]` is the positive-only form.

Source: MOPD (arXiv:2605.12652); 2S1F with `failure_solution_condition = "always"`. Where we differ: as in `sdpo.py` and
`contexts/peers.py` (seeded, length-debiased choice of peers; budgets that never cut the question).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from opdkit.methods.sdpo import TEACHER, TRAIN, FromSiblings


class MOPD(FromSiblings):
    name: Literal["mopd"] = "mopd"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": TEACHER,
        "context": {"kind": "peers", "slots": ["success", "success", "failure"], "failures": "always"},
        "sampling": {"group_size": 8, "temperature": 1.0, "max_answer_tokens": 4096},
        "train": TRAIN,
    }
