"""What reading a server's lists costs: `prompt_logprobs` as Python objects, and as opdkit reads them.

    python benchmarks/prompt_logprobs.py --tokens 512

CPU microseconds a token of one process, the least of three, for lists of 0, 1, 16 and 64 ids, with vLLM's own layout.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from opdkit.engines.servers.prompt_logprobs import Loaded, Scan, signal_of

TEXTS = (" the", '"a"', "}{", "\n", "\u00e9")


def answer(num_tokens: int, k: int) -> tuple[list[int], bytes]:
    """(prompt, body) as a server would write it."""
    generator = np.random.default_rng(0)
    prompt, said = [0], [None]
    for _ in range(num_tokens):
        ids = generator.choice(151_000, k + 1, replace=False).tolist()
        prompt.append(ids[0])
        numbers = -np.sort(generator.exponential(4.0, k + 1)).astype(np.float32)
        entries: Any = {
            str(token): {"logprob": float(number), "rank": rank, "decoded_token": TEXTS[rank % len(TEXTS)]}
            for rank, (token, number) in enumerate(zip(ids, numbers, strict=True), 1)
        }
        said.append(entries)
    return prompt, json.dumps({"choices": [{"prompt_logprobs": said}]}, separators=(",", ":")).encode()


def microseconds(read: Callable[[], object], num_tokens: int) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        read()
        best = min(best, time.process_time() - started)
    return best / num_tokens * 1e6


def read_by(kind: Any, prompt: list[int], data: bytes, k: int, part: int) -> object:
    reader = kind()
    for start in range(0, len(data), part):
        reader.feed(data[start : start + part])
    return signal_of(reader.read(), prompt, 1, k or None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--part", type=int, default=1 << 20, help="bytes that arrive together")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {given.tokens} tokens")
    print("   k  bytes  as objects  in the bytes   (us a token, to arrays)")
    for k in (0, 1, 16, 64):
        prompt, data = answer(given.tokens, k)
        reads = [partial(read_by, kind, prompt, data, k, given.part) for kind in (Loaded, Scan)]
        took = [microseconds(read, given.tokens) for read in reads]
        print(f"{k:4d} {len(data) // given.tokens:6d} {took[0]:11.1f} {took[1]:13.1f}")


if __name__ == "__main__":
    main()
