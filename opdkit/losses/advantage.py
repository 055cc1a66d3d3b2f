"""How much better than expected: rewards within a group, the teacher against the student, and both together.

Letters: R rollouts of the batch, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opdkit.losses.names import AdvantageStd

STD_EPSILON = 1e-6  # added to the standard deviation in the published code (verl, GRPO)


def group_centred(reward_R: Tensor, group_R: Tensor, std: AdvantageStd) -> Tensor:
    """[R] reward minus the mean of its group, divided by the group's standard deviation if `std` asks for it.

    group_R: long, which group (0, 1, ...) each rollout belongs to. std "none" is Dr. GRPO (arXiv:2503.20783);
    "unbiased" is GRPO (arXiv:2402.03300) with the n - 1 estimator plus 1e-6. Equal rewards give 0 exactly, whatever
    their mean is rounded to. A group of one has nothing to compare with: as in the published code its mean counts as 0
    and its deviation as 1, so its advantage is its reward.
    """
    num_groups = int(group_R.max()) + 1 if group_R.numel() else 0
    count_G = torch.bincount(group_R, minlength=num_groups).to(reward_R.dtype)
    alone_R = count_G[group_R] == 1
    mean_G = reward_R.new_zeros(num_groups).index_add_(0, group_R, reward_R) / count_G.clamp(min=1)
    centred_R = torch.where(alone_R, reward_R, reward_R - mean_G[group_R])
    low_G, high_G = (
        reward_R.new_zeros(num_groups).scatter_reduce_(0, group_R, reward_R, how, include_self=False)
        for how in ("amin", "amax")
    )
    centred_R = torch.where(~alone_R & (low_G == high_G)[group_R], 0.0, centred_R)
    if std == "none":
        return centred_R
    variance_G = reward_R.new_zeros(num_groups).index_add_(0, group_R, centred_R**2) / (count_G - 1).clamp(min=1)
    std_R = torch.where(alone_R, 1.0, variance_G.sqrt()[group_R])
    return centred_R / (std_R + STD_EPSILON)


def returns(reward_U: Tensor, row_U: Tensor, discount: float) -> Tensor:
    """[U] discounted reward to go of every turn: its own and the discounted ones behind it. U turns, those of a row
    together and in order."""
    going = reward_U.double().clone()
    for place in range(len(going) - 2, -1, -1):
        if row_U[place] == row_U[place + 1]:
            going[place] += discount * going[place + 1]
    return going


def centred_by_turn(return_U: Tensor, group_U: Tensor, turn_U: Tensor, std: AdvantageStd) -> Tensor:
    """[U] each turn's return minus the mean over the siblings that reached that turn, divided by their standard
    deviation if `std` asks for it; 0 where fewer than two reached it."""
    most = int(turn_U.max()) + 1 if turn_U.numel() else 1
    compared_U = torch.unique(group_U * most + turn_U, return_inverse=True)[1]
    centred_U = group_centred(return_U, compared_U, std)
    return torch.where(torch.bincount(compared_U)[compared_U] > 1, centred_U, 0.0)


def group_return(token_reward_N: Tensor, row_N: Tensor, group_R: Tensor, std: AdvantageStd) -> Tensor:
    """[N] rewards of tokens, centred (and scaled) among all tokens of their problem, then summed to the answer's end.

    The process form of GRPO (arXiv:2402.03300, Sec. 4.1.3), thunlp's `token_grpo`: unlike one token's reward, a return
    credits a token with what came after it. row_N: rows in order, the tokens of each together.
    """
    centred_N = group_centred(token_reward_N, group_R[row_N], std)
    summed_N = centred_N.double().cumsum(0)
    last_R = torch.bincount(row_N, minlength=len(group_R)).cumsum(0) - 1
    return (summed_N[last_R[row_N]] - summed_N).to(centred_N.dtype) + centred_N


def teacher_minus_student(teacher_logprob_N: Tensor, student_logprob_N: Tensor) -> Tensor:
    """[N] log q - log p of the sampled token, held constant: positive where the teacher likes the token better."""
    return (teacher_logprob_N - student_logprob_N).detach()


def scaled_by_ratio(advantage_N: Tensor, gap_N: Tensor, share: float, width: float) -> Tensor:
    """[N] A ((1 - share) + share clip(e^(sign(A) d), 1 - width, 1 + width)), d = `gap_N` = log q - log p.

    d is held constant. The reward says which way, the teacher how far (RLSD, arXiv:2604.03128).
    NaN in d: nothing is known, A stays.
    """
    ratio_N = (advantage_N.sign() * gap_N.detach()).exp().clamp(1 - width, 1 + width)
    return torch.where(gap_N.isnan(), advantage_N, advantage_N * (1 - share + share * ratio_N))


def sign_kept(advantage_N: Tensor, bonus_N: Tensor) -> Tensor:
    """[N] A + bonus, cut at 0 before its sign would turn; 0 where A is 0 (RLCSD, arXiv:2606.11709)."""
    moved_N = advantage_N + bonus_N
    return torch.where(advantage_N > 0, moved_N.clamp(min=0), torch.where(advantage_N < 0, moved_N.clamp(max=0), 0.0))


def log_mean(logprobs: Sequence[Tensor]) -> Tensor:
    """[N] log of the mean probability over several readings of each token. NaN: missing; NaN where all are."""
    logprob_CN = torch.stack(list(logprobs))
    known_CN = ~logprob_CN.isnan()
    count_N = known_CN.sum(0)
    total_N = logprob_CN.masked_fill(~known_CN, -math.inf).logsumexp(0)
    return torch.where(count_N > 0, total_N - count_N.log(), math.nan)
