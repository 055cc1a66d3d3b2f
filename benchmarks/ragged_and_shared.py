"""What packed passes and shared prefixes save, on a CPU; writes docs/measurements/passes.md.

    python benchmarks/ragged_and_shared.py              # about three minutes of one idle thread
    python benchmarks/ragged_and_shared.py --repeats 7  # steadier

A random model of 2 layers and width 256 with a vocabulary of 512, so that its body is what costs. Every figure is of
processor seconds; the ways take turns, and the median of each counts. "scoring" is `HFEngine.score` for log-probs of
the answer tokens, "update" a forward and a backward pass with the loss head (negative log-likelihood) over the same
rows. The ways:

- side by side: rows sorted by length, as many neighbours as a budget of padded positions holds (opdkit 0.1, whose
  budgets were 65536 and 32768)
- padded: the plan of `engines.passes.plan_padded`, for models that cannot be packed
- packed: `engines.packed`, without sharing
- shared: packed, and what siblings read before they differ is read once
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from opdkit.engines.forward.passes import Passes, passes_on, plan_padded
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.scratch import char_tokenizer
from opdkit.losses import NegativeLogLikelihood, Term, head_loss
from opdkit.types import Asked

WIDTH, LAYERS, VOCABULARY, POSITIONS = 256, 2, 512, 4096
PAGE = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "passes.md"


@dataclass(frozen=True)
class Rows:
    contexts: list[list[int]]
    answers: list[list[int]]


def tiny_model() -> LanguageModel:
    tokenizer = char_tokenizer("".join(chr(0x4E00 + number) for number in range(VOCABULARY - 8)))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 128,
        max_position_embeddings=POSITIONS,
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, name="a random Llama")


def ragged(num: int, seed: int = 0) -> Rows:
    """Prompts of 40 tokens of their own, answers of log-normal length between 20 and 500."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(110), 0.8, num)).clip(20, 500).astype(int)
    return Rows([random_ids(rng, 40) for _ in lengths], [random_ids(rng, length) for length in lengths])


def siblings(prompt: int, answer: int, num: int = 8, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows([random_ids(rng, prompt)] * num, [random_ids(rng, answer) for _ in range(num)])


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(2, VOCABULARY - 8, length).tolist()


def side_by_side(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    order, parts = sorted(range(len(lengths)), key=lambda row: lengths[row]), list[list[int]]()
    for row in order:
        if parts and lengths[row] * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


Plan = Sequence[Sequence[int]]


def update(model: LanguageModel, rows: Rows, passes: Passes, *, packs: bool, plan: Plan | None = None) -> None:
    model.packs = packs
    model.module.zero_grad(set_to_none=True)
    for part in plan or model.planned(rows.contexts, rows.answers, passes):
        answers = [rows.answers[row] for row in part]
        hidden_NH = model.hidden([rows.contexts[row] for row in part], answers, passes=passes)
        ids_N = torch.tensor([token for answer in answers for token in answer])
        term = Term(name="nll", loss=NegativeLogLikelihood(), coef_N=torch.full((len(ids_N),), 1e-3))
        head_loss(hidden_NH, model.head(), ids_N, [term], {}).loss.backward()


def score(model: LanguageModel, rows: Rows, passes: Passes, *, packs: bool, plan: Plan | None = None) -> None:
    model.packs, model.passes = packs, passes
    if plan is None:
        HFEngine(model).score(rows.contexts, rows.answers, Asked("sampled"))
        return
    model.passes = replace(passes, max_tokens=1 << 30, fixed_tokens=1 << 30)  # the plan is made already
    for part in plan:
        contexts, answers = [rows.contexts[row] for row in part], [rows.answers[row] for row in part]
        HFEngine(model).score(contexts, answers, Asked("sampled"))


def medians(
    ways: Mapping[str, Callable[[], object]], model: LanguageModel, repeats: int
) -> dict[str, tuple[float, str]]:
    """Processor seconds of each way, and positions computed per token of the rows."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, str] = {}
    for _ in range(repeats + 1):  # the first to warm up
        for name, way in ways.items():
            model.positions.clear()
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
            computed[name] = f"{model.positions['computed'] / model.positions['rows']:.2f}"
    return {name: (statistics.median(found[1:]), computed[name]) for name, found in seconds.items()}


def measure_ragged(model: LanguageModel, repeats: int) -> list[str]:
    rows = ragged(64)
    lengths = [39 + len(answer) for answer in rows.answers]
    lines = []
    for name, work, budget, learning in (("scoring", score, 65536, False), ("update", update, 32768, True)):
        passes, wide = replace(passes_on("cpu", learning=learning), least_shared=None), side_by_side(lengths, budget)
        ways = {
            "side by side": partial(work, model, rows, passes, packs=False, plan=wide),
            "padded": partial(work, model, rows, passes, packs=False),
            "packed": partial(work, model, rows, passes, packs=True),
        }
        found = medians(ways, model, repeats)
        base = found["side by side"][0]
        lines += [f"| {name} | {key} | {each} | {took / base:.2f} |" for key, (took, each) in found.items()]
    return lines


def measure_shared(model: LanguageModel, repeats: int) -> list[str]:
    lines = []
    for prompt, answer in ((512, 128), (1024, 256)):
        rows = siblings(prompt, answer)
        for name, work, learning in (("scoring", score, False), ("update", update, True)):
            shared = passes_on("cpu", learning=learning)
            alone = replace(shared, least_shared=None)
            ways = {
                "packed": partial(work, model, rows, alone, packs=True),
                "shared": partial(work, model, rows, shared, packs=True),
            }
            found = medians(ways, model, repeats)
            ratio = found["shared"][0] / found["packed"][0]
            lines.append(f"| 8 x ({prompt} + {answer}) | {name} | {found['shared'][1]} | {ratio:.2f} |")
    return lines


def measure_plans() -> list[str]:
    lines = []
    for device in ("cpu", "cuda", "mps"):
        for num in (64, 1024):
            worst = 0.0
            for seed in range(5):
                lengths = [len(answer) for answer in ragged(num, seed).answers]
                plan = plan_padded(lengths, passes_on(device, learning=True))
                padded = sum(len(part) * max(lengths[row] for row in part) for part in plan)
                worst = max(worst, padded / sum(lengths))
            lines.append(f"| {device} | {num} | {len(plan)} | {worst:.3f} |")
    return lines


PAGE_TEXT = """# Ragged answers and shared prefixes

Written by `python benchmarks/ragged_and_shared.py`{how}; {where}. Processor seconds, medians of {repeats} turns.
A random Llama of {layers} layers, width {width}, vocabulary {vocabulary}.

Not run on a GPU yet.

## Ragged answers

64 rows: prompts of 40 tokens, answers of log-normal length between 20 and 500. "Computed" is positions that the model
computes for each token of the rows; "time" is a share of what opdkit 0.1 took (rows side by side, budgets of 65536 and
32768 padded positions).

| | way | computed | time |
|---|---|---|---|
{ragged}

"padded" is for models that cannot be read in packed passes (recurrent ones, Llama 4): the cheapest plan where a pass
costs its padded positions and a fixed number more. Positions that such plans compute for each token, the most of five
seeds, for the answers alone:

| device's constants | rows | passes | computed |
|---|---|---|---|
{plans}

A pass on CUDA has to be filled before its time grows, so the plan pads rather than launch more; packed passes, which
are what it is for, pad to a multiple of 128 positions.

## Shared prefixes

8 answers to one prompt; time of a shared pass as a share of a packed one without sharing.

| rows | | computed | time |
|---|---|---|---|
{shared}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="print the page, and do not write it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model()
    assert model.is_packed, model.notes
    text = PAGE_TEXT.format(
        how=f" --repeats {options.repeats}" if options.repeats != 3 else "",
        where=f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}",
        repeats=options.repeats,
        layers=LAYERS,
        width=WIDTH,
        vocabulary=VOCABULARY,
        ragged="\n".join(measure_ragged(model, options.repeats)),
        plans="\n".join(measure_plans()),
        shared="\n".join(measure_shared(model, options.repeats)),
    )
    if options.print:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
