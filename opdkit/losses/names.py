"""The words a recipe may use for losses. No torch here: configuration models import these names."""

from __future__ import annotations

from typing import Literal

SupportKind = Literal[
    "full", "sampled", "student_topk", "teacher_topk", "union", "intersection", "symmetric_difference"
]
TailKind = Literal["bucket", "renormalise", "renormalise_teacher", "drop"]
DivergenceKind = Literal[
    "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "mixed_kl", "renyi"
]
TargetKind = Literal["logits", "mixture"]
JsdScale = Literal["continuous", "published"]
Reduction = Literal["token", "sequence", "turn", "sequence_sum", "sum", "constant"]
ClipKind = Literal["none", "token", "entry"]
SurrogateForm = Literal["log_prob", "ratio"]
RatioLevel = Literal["token", "sequence"]
EntryWeight = Literal["student_p", "teacher_p", "none"]
AdvantageStd = Literal["none", "unbiased"]
GradientPath = Literal["closed_form", "autograd"]
