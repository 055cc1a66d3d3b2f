"""Contrast of hints inside GRPO: what a right hint says of a token less what wrong hints say, as a bonus to the reward.

    e = log T(y | right hint) - log mean over k T(y | wrong hint k)        held constant
    r = clip(beta hint_share tanh(e / tau), -bonus_clip, bonus_clip);  a token is selected where |r| > delta
    A' = A + r, cut at 0 before its sign would turn; 0 where A is 0
    L = mean over unselected tokens of PPO(A) + eta * mean over selected tokens of PPO(A')

Hints are answers of the group in one and the same wording, so that what is common to reading any solution (its style)
cancels. A is GRPO's; a group of equal rewards is silent, and has no right or no wrong hint. A token without a hint of
both kinds keeps A. Views: "right", and "wrong" with up to `count` readings.

The repository contradicts itself; `published` names whose tau, eta, beta and clip: "config" (its recipes: .02, 1, 1,
2), "readme" (1.3, .5; else "config"), "code" (what the loss falls back to: beta .2, clip .5). As |tanh| < 1, no
published clip ever acts. The README's teacher is fixed, weights = "initial", the default here; that of its recipes is a
snapshot every 10 steps, for which weights has no choice ("ema" is the nearest).

Source: RLCSD (arXiv:2606.11709, github.com/THU-BPM/RLCSD). Where we differ: the hints' wording is ours (theirs, headed
"Reference Solution", is not in what we saw); the cap of 2 on the ratio to the sampler is not here, PPO's ratio is to
the sampler already; means are over the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from opdkit import losses
from opdkit.methods.base import Report
from opdkit.methods.group_reward import GroupReward
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term

CONFIG = {"tau": 0.02, "eta": 1.0, "beta": 1.0, "bonus_clip": 2.0}
PUBLISHED = {
    "config": CONFIG,
    "readme": CONFIG | {"tau": 1.3, "eta": 0.5},
    "code": CONFIG | {"beta": 0.2, "bonus_clip": 0.5},
}
HINT = "\n\nReference Solution:\n{text}"
LAYOUT = "{question}{success}{failure}\n\nSolve the problem step by step."
WORDING = {"layout": LAYOUT, "success": HINT, "failure": HINT}
PEERS = {"kind": "peers", "feedback": "never", "remove_thinking": "always", "wording": WORDING}
TEACHER = {"kind": "self", "weights": "initial"}


class RLCSD(GroupReward):
    name: Literal["rlcsd"] = "rlcsd"
    published: Literal["config", "readme", "code"] = "config"  # whose numbers
    tau: float = Field(gt=0)  # nats; this and the next three are `published`'s unless they are set
    eta: float = Field(ge=0)  # weight of the selected tokens' mean
    beta: float = Field(ge=0)  # beta hint_share is the largest bonus
    bonus_clip: float = Field(gt=0)  # of the bonus, either way
    hint_share: float = Field(0.5, ge=0)  # lambda of the paper
    delta: float = Field(0.02, ge=0)  # a token is selected whose bonus is above it

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "views": {
            "right": {"teacher": TEACHER, "context": {**PEERS, "slots": ["success"]}},
            "wrong": {"teacher": TEACHER, "context": {**PEERS, "slots": ["failure"]}, "count": 4},
        },
        "sampling": {"group_size": 8, "temperature": 1.0, "top_p": 0.95, "top_k": 20, "max_answer_tokens": 16384},
        "train": {"problems_per_step": 8, "lr": 1e-6, "warmup_steps": 50, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }

    @model_validator(mode="before")
    @classmethod
    def _numbers_by_name(cls, keys: Any) -> Any:
        name = keys.get("published", "config") if isinstance(keys, Mapping) else None
        return {**PUBLISHED[name], **keys} if isinstance(name, str) and name in PUBLISHED else keys

    @property
    def needs(self) -> Needs:
        return Needs(views={"right": Asked("sampled"), "wrong": Asked("sampled")}, reward=True)

    def contrast_N(self, plan: PlanInputs) -> Tensor:
        """[N] e, nats; NaN: one of the two kinds of hint is missing."""
        right_N, wrong_N = (losses.log_mean(plan.readings(view)) for view in ("right", "wrong"))
        return right_N - wrong_N

    def bonus_N(self, plan: PlanInputs) -> Tensor:
        """[N] r; 0 where nothing is known."""
        squashed_N = (self.contrast_N(plan).nan_to_num(0.0) / self.tau).tanh()
        return (self.beta * self.hint_share * squashed_N).clamp(-self.bonus_clip, self.bonus_clip)

    def terms(self, plan: PlanInputs) -> list[Term]:
        bonus_N = self.bonus_N(plan)
        compared_N, selected_N = self.compared_R(plan)[plan.row_N], bonus_N.abs() > self.delta
        moved_N = losses.sign_kept(self.advantage_N(plan), bonus_N)
        return [
            self.reward_term(plan, mask_N=compared_N & ~selected_N),
            self.reward_term(plan, self.eta, name="hinted", advantage_N=moved_N, mask_N=compared_N & selected_N),
        ]

    def report(self, plan: PlanInputs) -> Report:
        contrast_N, selected_N = self.contrast_N(plan)[plan.mask_N], self.bonus_N(plan)[plan.mask_N].abs() > self.delta
        known_N = contrast_N[~contrast_N.isnan()].abs().double()
        mean = float(known_N.mean()) if len(known_N) else None
        return Report(numbers={"share_of_tokens_selected": float(selected_N.double().mean()), "mean_contrast": mean})

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        if {"right", "wrong"} <= recipe.views.keys() and recipe.views["right"] == recipe.views["wrong"]:
            yield "[views.right] and [views.wrong] are one and the same: their contrast is zero; show them other hints"

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if recipe.views["right"].teacher != recipe.views["wrong"].teacher:
            yield (
                "[views.right.teacher] and [views.wrong.teacher] differ: the contrast is then also one of two models, "
                "not only of two hints; give both the same"
            )
