"""Whether an answer ends in a loop: the same tokens again and again, until something stops it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TIMES = 4  # that the block stands there, one behind the other
LEAST_TOKENS = 32  # of the loop in all: a row of dashes in a table is none
LONGEST_BLOCK = 256  # tokens


def ends_in_a_loop(answer_ids: Sequence[int] | npt.NDArray[np.int64]) -> bool:
    """Whether the last tokens are one block of up to 256 tokens, at least four times and at least 32 tokens in all."""
    ids_T = np.asarray(answer_ids)[-TIMES * LONGEST_BLOCK :]
    longest = min(LONGEST_BLOCK, len(ids_T) // TIMES)
    # Only a block that the last token ends can be repeated to the end.
    for size in 1 + np.flatnonzero(ids_T[-longest - 1 : -1][::-1] == ids_T[-1]) if longest else ():
        tail_T = ids_T[-max(LEAST_TOKENS, TIMES * int(size)) :]
        if len(tail_T) >= LEAST_TOKENS and (tail_T[size:] == tail_T[:-size]).all():
            return True
    return False
