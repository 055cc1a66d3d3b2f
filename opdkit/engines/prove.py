"""The proof that a model is scored and sampled as it is: made on a few short rows whenever a model is made.

The head is taken out of the module, rows are padded, and sampling reads through a cache. Each of these is right for one
architecture and silently wrong for another, so each is compared with the module's own answer on one row alone:

1. logits: our head over our hidden states gives the module's logits;
2. scoring: a row's states are the same beside a longer row, hence no token sees a later one;
3. sampling: prompts of different lengths, padded on the left, read once for several rows and then token by token
   through the cache, while rows leave, give the states of each row alone.

What the proof cannot see is what happens beyond its few tokens: windows and switches at thousands of positions are
tested on tiny models (tests/engines), not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdkit.engines.decode import Batch
from opdkit.errors import UserError

if TYPE_CHECKING:
    from opdkit.engines.model import LanguageModel

PROOF_LENGTH, PROOF_SHORT = 21, slice(1, 6)  # tokens of the long row; answer tokens of the short one beside it
SAMPLED = 4  # tokens that are predicted with the cache: one from the prompt, three steps behind it
# Largest share by which what is equal may differ. Low precision rounds in another order for another shape of the batch.
SAME_PASS = {True: 1e-4, False: 2e-2}  # exact dtype?
OTHER_PASS = {True: 1e-4, False: 1e-1}
CACHED = {True: 1e-3, False: 2e-1}  # recurrent layers have two algorithms; a missing past is off by more than half


def prove(model: LanguageModel) -> None:
    """Raise UserError, one sentence, unless all of the above holds."""
    kind = f"{model.name} (model type {model.config.model_type})"
    try:
        with torch.no_grad():
            alone_TH = _prove_scoring(model, kind)
            _prove_sampling(model, kind, alone_TH)
    except UserError:
        raise
    except Exception as error:  # whatever a library raises in a pass over valid ids is about the model
        reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".:")
        raise UserError(
            f"{kind} cannot be run the way opdkit reads and samples causal language models "
            f"({type(error).__name__}: {reason}); use another model, or attn_implementation = \"eager\"."
        ) from error


def _prove_scoring(model: LanguageModel, kind: str) -> Tensor:
    """States of the long row alone, [T, H]."""
    row, exact = _row(model), _exact(model)
    with model.evaluating():
        ids_1T = torch.tensor([row], device=model.device)
        theirs_TV = model.module(input_ids=ids_1T, use_cache=False).logits[0]
    alone_TH = model.hidden([row[:1]], [row[1:]])
    if alone_TH.shape[-1] != model.hidden_width:
        raise UserError(
            f"{kind} has states of width {alone_TH.shape[-1]} before a head of width {model.hidden_width}: what lies "
            "between is not known to opdkit, so it would be scored wrongly; use another model."
        )
    head = model.head().trimmed(alone_TH.dtype)
    ours_TV = head.logits(head.project(alone_TH), temperature=1.0)
    if not bool(theirs_TV.isfinite().all()):
        raise UserError(
            f"{model.name} gives logits that are not finite numbers in {model.dtype}; "
            "use bfloat16 or float32, or another copy of its weights."
        )
    if not close(proof_hidden(model), torch.cat([alone_TH, alone_TH[: len(row[PROOF_SHORT])]]), OTHER_PASS[exact]):
        raise UserError(
            f"{model.name} is not causal: tokens that follow change the states before them; "
            "use a causal (left-to-right) language model."
        )
    # A wrong scale is off by far more than rounding.
    if not close(ours_TV, theirs_TV[:-1, : model.num_tokens], SAME_PASS[exact]):
        raise UserError(
            f"{kind} makes its logits in a way opdkit does not know (they differ from the scaled and soft-capped output "
            "of its head), so it would be scored wrongly; use another model, or add its transform to "
            "opdkit/engines/anatomy.py."
        )
    return alone_TH


def _prove_sampling(model: LanguageModel, kind: str, alone_TH: Tensor) -> None:
    long = _row(model)
    num = min(SAMPLED, len(long) - 1)
    prompt = max(1, len(long) // 4)
    short = long[-1 - num - prompt :][: num + prompt]
    rows = [(long[:-num], long[-num:]), (short[:-num], short[-num:])]
    expected = [alone_TH[-num:], model.hidden([rows[1][0]], [rows[1][1]])]
    present = [0, 1, 0]  # two rows of the long prompt, which is read once
    ours, theirs = [], []
    with model.evaluating():
        batch = Batch(model, [rows[row][0] for row in present], num)
        for step in range(num):
            ours.append(batch.hidden_BH)
            theirs.append(torch.stack([expected[row][step] for row in present]))
            if step + 1 == num:
                break
            if step == 1:  # a row leaves, the others change places
                batch.keep(torch.tensor([1, 0], device=model.device))
                present = [1, 0]
            batch.advance(torch.tensor([rows[row][1][step] for row in present], device=model.device))
    difference = _share(torch.cat(ours), torch.cat(theirs))
    if not difference <= CACHED[_exact(model)]:
        raise UserError(
            f"{kind} gives other states when it is read token by token through a cache, in a batch padded on the left, "
            f"than over each row alone (off by {difference:.0%} of their size): the policy that samples would not be "
            "the one that is trained; use another model."
        )


def proof_hidden(model: LanguageModel) -> Tensor:
    """States of the long row and of a short one beside it, [N, H]."""
    row = _row(model)
    return model.hidden([row[:1], row[:1]], [row[1:], row[PROOF_SHORT]])


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is at most `tolerance` of the largest entry. NaN is never close."""
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _share(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm: unlike the largest entry, no single outlying width decides."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def _row(model: LanguageModel) -> list[int]:
    length = PROOF_LENGTH if model.max_positions is None else min(PROOF_LENGTH, model.max_positions)
    return [(1 + 31 * index * index) % model.num_tokens for index in range(length)]


def _exact(model: LanguageModel) -> bool:
    return model.dtype in (torch.float32, torch.float64)
