"""Log-probs of chosen ids, one number each: `prompt_logprob_token_ids` of vLLM 0.32.

    {"sampling_params": {"prompt_logprob_token_ids": [[29], [441]], "prompt_logprob_start": 5, ...}}
    -> {"prompt_token_id_logprobs": "<base64 of a float32 .npy of [rows, ids]>", ...}

Row i is of the prompt's token start + i + 1, over the whole vocabulary and at temperature 1, like `prompt_logprobs`:
4 bytes a token in place of about 80 of JSON. vLLM has it where its second model runner works (on GPUs, by its source;
its CPU build refuses it), at the address of token ids (--enable-scale-out). Whether a server has it, and says the
same as its prompt log-probs, is found out by asking (`probe`).
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from opdkit.engines.model import Ids
from opdkit.engines.servers.http import HalfError
from opdkit.types import FloatArray

PATH = "/inference/v1/generate"
FIELD = "prompt_token_id_logprobs"


def body(model: str, context: Ids, answer: Ids) -> dict[str, Any]:
    """Asks for the answer's own tokens. One token is written, since none cannot be asked for."""
    return {
        "model": model,
        "token_ids": [*context, *answer],
        "stream": False,
        "sampling_params": {
            "n": 1,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "detokenize": False,
            "prompt_logprob_token_ids": [[int(token)] for token in answer],
            "prompt_logprob_start": len(context) - 1,
        },
    }


def read(said: Any, count: int) -> FloatArray:
    """[T] float32 of `count` tokens. Raises HalfError for what is none."""
    try:
        file = io.BytesIO(base64.b64decode(said[FIELD], validate=True))
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # allocates nothing
        data = file.read()
    except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
        raise HalfError(f"its {FIELD} cannot be read ({type(error).__name__})") from None
    if shape != (count, 1) or dtype.kind != "f" or len(data) != count * dtype.itemsize:
        raise HalfError(f"its {FIELD} are {len(data)} bytes of {dtype} {shape}, not floats of ({count}, 1)")
    logprob_T = np.frombuffer(data, dtype=dtype).astype(np.float32)
    if not np.isfinite(logprob_T).all() or (logprob_T > 1e-3).any():
        raise HalfError(f"its {FIELD} are no log-probs")
    return logprob_T


def offered(said: Any) -> bool:
    """Whether an answer has them at all: an older server ignores what it does not know, with status 200."""
    return isinstance(said, dict) and said.get(FIELD) is not None
