"""The proof that a model is scored and sampled as it is: made on a few short rows whenever a model is made.

The head is taken out of the module, rows are padded, and sampling reads through a cache. Each of these is right for one
architecture and silently wrong for another, so each is compared with the module's own answer on one row alone:

1. logits: our head over our hidden states gives the module's logits;
2. scoring: a row's states are the same beside a longer row, hence no token sees a later one;
3. sampling: prompts of different lengths, padded on the left, read once for several rows and then token by token
   through the cache, while rows leave and others join, give the states of each row alone.

4. packed passes (`why_not_packed`, before the first pass that scores): three ragged rows one behind the other, and rows
   that share their beginning, give the states of padded passes. A model that is not read so is padded, not refused.

What the proof cannot see is what happens beyond its few tokens: windows and switches at thousands of positions are
tested on tiny models (tests/engines), not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit.engines.causal import CausalModel
from opdkit.engines.forward.passes import Passes
from opdkit.engines.sampling.decode import Batch
from opdkit.errors import UserError

PROOF_LENGTH, PROOF_SHORT = 21, slice(1, 6)  # tokens of the long row; answer tokens of the short one beside it
SAMPLED = 4  # tokens that are predicted with the cache: one from the prompt, three steps behind it
EXACT = 1e-4  # by what share of its size may differ what is equal but for rounding; tiny models: 1e-5
# In low precision, for one pass, for passes of another shape, and with a cache. It rounds more than a small mistake
# moves, so what is off by more than is ordinary there (32 layers: 0.02) is looked at again in float32.
LOW_SAME_PASS, LOW_OTHER_PASS, LOW_CACHED, LOW_ORDINARY = 2e-2, 1e-1, 3e-1, 3e-2


def prove(model: CausalModel) -> None:
    """Raise UserError, one sentence, unless all of the above holds."""
    kind = f"{model.name} (model type {model.config.model_type})"
    try:
        with torch.no_grad():
            with model.using(_read_in_half(model)):
                difference = _prove(model, kind)
            if difference > LOW_ORDINARY:
                _prove_in_float32(model, kind, difference)
    except UserError:
        raise
    except Exception as error:  # whatever a library raises in a pass over valid ids is about the model
        raise UserError(
            f"{kind} cannot be run the way opdkit reads and samples causal language models ({_reason(error)}); "
            'use another model, or attn_implementation = "eager".'
        ) from error


def _read_in_half(model: CausalModel) -> dict[str, Tensor] | None:
    """bfloat16 copies of float32 weights for kernels that take nothing else; training reads such copies too."""
    if model.dtype == torch.float32 and "flash" in str(getattr(model.config, "_attn_implementation", "")):
        return {name: parameter.bfloat16() for name, parameter in model.module.named_parameters()}
    return None


def _prove_in_float32(model: CausalModel, kind: str, difference: float) -> None:
    try:
        copies = {name: parameter.float() for name, parameter in model.module.named_parameters()}
        with model.using(copies):
            _prove(model, kind)
    except UserError:
        raise
    except Exception as error:  # no memory for the copies, or a module that mixes in its own dtype
        model.warnings.append(
            f"{kind} in {model.dtype} is off by {difference:.1%} when rows are padded or read through a cache, which "
            f"may be rounding; it could not be proved in float32 ({_reason(error)})"
        )


def _prove(model: CausalModel, kind: str) -> float:
    """By what share something differs in low precision, at most; 0 in an exact one. Raises UserError if too much."""
    exact = model.dtype in (torch.float32, torch.float64)
    row = _row(model)
    with model.evaluating():
        ids_1T = torch.tensor([row[:-1]], device=model.device)
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
    # A wrong scale is off by far more than rounding.
    if not close(ours_TV, theirs_TV[:, : model.num_tokens], EXACT if exact else LOW_SAME_PASS):
        raise UserError(
            f"{kind} makes its logits in a way opdkit does not know (they differ from the scaled and soft-capped "
            "output of its head), so it would be scored wrongly; use another model, or add its transform to "
            "opdkit/engines/anatomy.py."
        )
    together_TH, twice_TH = proof_hidden(model), torch.cat([alone_TH, alone_TH[: len(row[PROOF_SHORT])]])
    if len(row) > 2:  # a token less behind them, and a row beside them
        together_TH = torch.cat([together_TH, model.hidden([row[:1]], [row[1:-1]])])
        twice_TH = torch.cat([twice_TH, alone_TH[:-1]])
    if not close(together_TH, twice_TH, EXACT if exact else LOW_OTHER_PASS):
        raise UserError(
            f"{model.name} is not causal: tokens that follow change the states before them; "
            "use a causal (left-to-right) language model."
        )
    cached = _share(*_cached_and_whole(model, row, alone_TH))
    if not cached <= (EXACT if exact else LOW_CACHED):
        raise UserError(
            f"{kind} gives other states when it is read token by token through a cache, in a batch padded on the left, "
            f"than over each row alone (off by {cached:.2g} of their size): the policy that samples would not be the "
            "one that is trained; use another model."
        )
    return 0.0 if exact else max(cached, _share(together_TH, twice_TH))


def _cached_and_whole(model: CausalModel, long: list[int], alone_TH: Tensor) -> tuple[Tensor, Tensor]:
    """States of the last tokens of two rows of different length, [n, H]: as sampling reads them, and in one pass."""
    num = min(SAMPLED, len(long) - 1)
    prompt = max(1, len(long) // 4)
    short = long[-1 - num - prompt :][: num + prompt]
    rows = [(long[:-num], long[-num:]), (short[:-num], short[-num:])]
    expected = [alone_TH[-num:], model.hidden([rows[1][0]], [rows[1][1]])]
    texts, caps = [[*prompt, *answer] for prompt, answer in rows], [len(prompt) + num for prompt, _ in rows]
    starts = [len(prompt) - 1 for prompt, _ in rows]

    def batch_of(present: list[int]) -> Batch:
        return Batch.of(model, [rows[row][0] for row in present], max(caps), [caps[row] for row in present])

    present = [(0, 0), (1, 0), (0, 0)]  # (row, tokens of its answer that are read): the long prompt is read once
    ours, theirs = [], []
    with model.evaluating():
        batch = batch_of([row for row, _ in present])
        for step in range(num):
            if step == 2:  # a row leaves, the others change places; and two join, where the cache takes rows
                others = [(batch_of([1, 0]), [0, 1])] if batch.takes_rows else []
                batch = batch.joined([1, 0], others, max(caps))
                present = [present[1], present[0], *((row, 0) for row in (1, 0) if others)]
            if step == 3:  # the longest leaves
                batch = batch.joined([0], [], max(caps))
                present = present[:1]
            ids = [texts[row][starts[row] + read] for row, read in present]
            ours.append(batch.advance(torch.tensor(ids, device=model.device)))
            theirs.append(torch.stack([expected[row][read] for row, read in present]))
            present = [(row, read + 1) for row, read in present]
    return torch.cat(ours), torch.cat(theirs)


def why_not_packed(model: CausalModel) -> str | None:
    """Why a model cannot be read in packed passes (`engines.packed`), in words; None: it can.

    What the rows of the proof cannot show is known beforehand: Llama 4's queries are scaled by the column of the pass.
    """
    if getattr(model.config.get_text_config(decoder=True), "attn_temperature_tuning", False):
        return "its queries are scaled by the column of the pass, not by the place in the row"
    row = _row(model)
    half, third = row[: len(row) // 2], row[: len(row) // 3]
    ragged = [row, half, row[::-1][: len(row) - 2], [*half, *third], [*half, *row[:1], *third]]
    rows = [text for text in ragged if len(text) > 1] or [row]
    try:
        difference, exact = _packed_and_padded(model, rows, _read_in_half(model))
        if not exact and difference > LOW_ORDINARY:  # rounding, or a fault that it hides?
            copies = {name: parameter.float() for name, parameter in model.module.named_parameters()}
            difference, exact = _packed_and_padded(model, rows, copies)
    except Exception as error:  # a library's for a mask that it does not know, a kernel that is not there
        return f"packed passes cannot be run ({_reason(error)})"
    if difference <= (EXACT if exact else LOW_ORDINARY):
        return None
    return f"in packed passes its states are others (off by {difference:.2g} of their size)"


@torch.no_grad()
def _packed_and_padded(
    model: CausalModel, rows: list[list[int]], weights: dict[str, Tensor] | None
) -> tuple[float, bool]:
    """(by what share the states of packed passes are off, whether they are exact numbers)."""
    asked = ([row[:1] for row in rows], [row[1:] for row in rows])
    states = []
    for model.packs in (False, True):
        states.append(model.hidden(*asked, weights=weights, passes=Passes(0, 0, least_shared=2)))
    return _share(states[1], states[0]), states[0].dtype in (torch.float32, torch.float64)


def proof_hidden(model: CausalModel) -> Tensor:
    """States of the long row and of a short one beside it, [N, H]."""
    row = _row(model)
    return model.hidden([row[:1], row[:1]], [row[1:], row[PROOF_SHORT]], weights=_read_in_half(model))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is at most `tolerance` of the largest entry. NaN is never close."""
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _share(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm: unlike the largest entry, no single outlying width decides."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def _row(model: CausalModel) -> list[int]:
    bounds = [bound for bound in (model.max_positions, model.switch_length) if bound is not None]
    length = min([PROOF_LENGTH, *bounds])
    return [(1 + 31 * index * index) % model.num_tokens for index in range(length)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0].rstrip('.:')}"
