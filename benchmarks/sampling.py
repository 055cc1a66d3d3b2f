"""What sampling costs beside transformers' `generate`: processor seconds for the same number of tokens, on a CPU.

    python benchmarks/sampling.py [--rounds 5] [--sizes 300 32000 151936] [--smollm2]

64 answers to 16 prompts of 20 to 60 tokens, from random models of 4 layers and width 256 in float32 (`--smollm2`: of
SmolLM2-135M's shape), whole vocabulary, temperature 1. Equal: 128 tokens each. Ragged: log-normal lengths of 20 to 500.
Both are told the lengths (`generate` by a stopping criterion for each row), so both make the same number of tokens;
nothing else ends an answer. Rounds alternate; given is the median of the rounds' ratios, and the least and largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from opdkit.engines.base import SamplingParams
from opdkit.engines.causal import CausalModel
from opdkit.engines.memory import TOKENS_PER_BATCH
from opdkit.engines.sampling.slots import Job, Slots
from opdkit.engines.scratch import char_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def random_model(size: int, shape: dict[str, Any]) -> CausalModel:
    """Of so many tokens; the tokenizer knows as many."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, max_position_embeddings=8192, tie_word_embeddings=True, **shape)
    model = CausalModel(
        LlamaForCausalLM(config).eval(), char_tokenizer("".join(chr(0x10000 + number) for number in range(size - 5)))
    )
    model.stop_ids = frozenset({10**9})  # lengths alone end an answer
    return model


def lengths(kind: str, num_rows: int) -> list[int]:
    if kind == "equal":
        return [128] * num_rows
    drawn = np.exp(np.random.default_rng(0).normal(4.6, 0.8, num_rows))
    return [int(length) for length in np.clip(drawn, 20, 500)]


class Lengths(StoppingCriteria):
    """Each row of `generate` ends after its own number of new tokens."""

    def __init__(self, limits: Sequence[int], prompt: int) -> None:
        self._ends_B = torch.tensor(limits) + prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self._ends_B <= input_ids.shape[1]


def by_generate(model: CausalModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Tokens made."""
    ids_BT = model.padded(prompts, side="left")
    size, lengths_B1 = ids_BT.shape[1], torch.tensor([[len(prompt)] for prompt in prompts])
    module: Any = model.module
    with torch.inference_mode():
        out_BT = module.generate(
            ids_BT,
            attention_mask=(torch.arange(size) >= size - lengths_B1).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(limits),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Lengths(limits, size)]),
        )
    assert out_BT.shape[1] == size + max(limits)
    return sum(limits)


def by_slots(model: CausalModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    jobs = [Job(tuple(prompt), seed, limit) for seed, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
    slots = Slots(model, jobs, SamplingParams(max_answer_tokens=max(limits)), max_tokens=TOKENS_PER_BATCH)
    with torch.inference_mode(), model.evaluating():
        return sum(len(answer.answer_ids) for answers in slots.run() for answer in answers.values())


def seconds(function: Callable[..., int], *args: Any) -> tuple[float, int]:
    started = time.process_time()
    num = function(*args)
    return time.process_time() - started, num


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="*", default=[300, 32000, 151936])
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--kinds", nargs="*", default=["equal", "ragged"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    for size in [49152] if asked.smollm2 else asked.sizes:
        model = random_model(size, SMOLLM2 if asked.smollm2 else SMALL)
        texts = [rng.integers(5, size, rng.integers(20, 60)).tolist() for _ in range(asked.rows // 4)]
        prompts = [texts[row // 4] for row in range(asked.rows)]
        for kind in asked.kinds:
            limits = lengths(kind, asked.rows)
            ratios, ours = [], []
            for _ in range(asked.rounds):
                own, num = seconds(by_slots, model, prompts, limits)
                theirs, num_theirs = seconds(by_generate, model, prompts, limits)
                assert num == num_theirs
                ratios.append(own / theirs)
                ours.append(own)
            middle, rate = statistics.median(ratios), sum(limits) / statistics.median(ours)
            print(
                f"V = {size}, {kind} ({sum(limits)} tokens, longest {max(limits)}): {middle:.2f} of generate's time "
                f"({min(ratios):.2f} to {max(ratios):.2f}), {rate:.0f} tokens a processor second",
                flush=True,
            )
    print(f"{asked.rows} answers, one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
