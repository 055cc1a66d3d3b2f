"""Batches of sampling: who is in them, how large they become, and that nobody's answer depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from opdkit.engines import memory
from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.forward import scoring
from opdkit.engines.forward.scoring import signals_of
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.sampling import decode, slots
from opdkit.engines.sampling.slots import Job, Slots
from opdkit.errors import Interrupted, UserError
from opdkit.losses import Head
from opdkit.losses.head import HeadStats
from opdkit.losses.heads import ROW_MULTIPLE
from opdkit.types import Asked

Make = Callable[..., tuple[Any, Any]]
CONFIGS = ["qwen3", "llama", "gemma2", "gemma3", "granite", "cohere", "qwen3_moe", "gpt2"]
PARAMS = SamplingParams(max_answer_tokens=48)
PROMPTS = [[3 + row % 5] * (1 + row % 3) for row in range(12)]
SEEDS = [100 + row for row in range(12)]


def model_of(architecture: Make, name: str, stops: frozenset[int] = frozenset({0, 1, 5})) -> LanguageModel:
    model = LanguageModel(*architecture(name))
    model.stop_ids = stops
    return model


def assert_same(ours: list[Sampled], theirs: list[Sampled]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.answer_ids == other.answer_ids and one.finish == other.finish
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=2e-5)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, columns) of every token that is decoded."""
    seen: list[tuple[int, int]] = []
    advance = decode.Batch.advance

    def watched(batch: decode.Batch, token_B: torch.Tensor) -> torch.Tensor:
        states = advance(batch, token_B)
        seen.append((len(batch.firsts), batch.width))
        return states

    monkeypatch.setattr(decode.Batch, "advance", watched)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_places_are_filled_from_the_queue(
    name: str, architecture: Make, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 60 positions a batch of answers of up to 48 tokens would hold one row; most end long before. Rows join as
    others end, are set aside where they outgrow the room, and go on: the same answers as all at once and in any order,
    in far fewer steps than one by one, and in the same batches a second time."""
    model = model_of(architecture, name)
    expected = HFEngine(model).sample(PROMPTS, SEEDS, PARAMS)
    monkeypatch.setattr(slots, "ROOM", 8)
    batches.clear()
    engine = HFEngine(model, max_tokens_per_batch=60)
    assert_same(engine.sample(PROMPTS, SEEDS, PARAMS), expected)
    plan, counts = [*batches], engine.counts
    assert plan[0][0] > 3 and all(rows == 1 or rows * columns <= 60 for rows, columns in plan)
    tokens = sum(len(answer.answer_ids) for answer in expected)
    assert counts.steps == len(plan) < 0.7 * tokens
    assert tokens <= counts.row_steps < 1.3 * tokens and counts.positions <= counts.room
    batches.clear()
    assert_same(HFEngine(model, max_tokens_per_batch=60).sample(PROMPTS, SEEDS, PARAMS), expected)
    assert batches == plan
    assert_same(engine.sample(PROMPTS[::-1], SEEDS[::-1], PARAMS)[::-1], expected)


def test_a_limit_that_is_not_reached_costs_nothing(
    architecture: Make, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 answers that end within a few tokens are one batch under a limit of 7168 tokens, as under one of 48; the
    budget is what would hold 9 rows of the limit."""
    model = model_of(architecture, "llama")
    model.max_positions = 8192
    rows, seeds = [PROMPTS[row % 12] for row in range(48)], [*range(48)]
    batches.clear()
    short = HFEngine(model).sample(rows, seeds, PARAMS)
    steps = len(batches)
    assert steps == max(len(answer.answer_ids) for answer in short)
    batches.clear()
    engine = HFEngine(model)
    long = engine.sample(rows, seeds, SamplingParams(max_answer_tokens=7168))
    assert len(batches) == max(len(answer.answer_ids) for answer in long) and batches[0][0] == 48
    assert engine.counts.evictions == 0
    assert_same([one for one in long if len(one.answer_ids) < 48], [one for one in short if one.finish == "stop"])


def test_a_batch_never_outgrows_its_tokens(
    architecture: Make, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a stop token every row goes on to its limit: several together only as long as they fit. Each is read
    again a few times, not at every token."""
    model = model_of(architecture, "qwen3", frozenset({10**6}))
    expected = HFEngine(model).sample(PROMPTS, SEEDS, PARAMS)
    monkeypatch.setattr(slots, "ROOM", 8)
    batches.clear()
    engine = HFEngine(model, max_tokens_per_batch=110)
    assert_same(engine.sample(PROMPTS, SEEDS, PARAMS), expected)
    assert all(rows == 1 or rows * columns <= 110 for rows, columns in batches)
    assert 0 < engine.counts.evictions < 40 and len(batches) < 0.6 * 12 * 48


def test_the_longest_give_way_to_many_others(
    architecture: Make, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long row beside which three short ones fit waits until the thirty of them are done, and is what it was."""
    model = model_of(architecture, "llama", frozenset({10**6}))
    long, short = Job((5,) * 30, 1, 40), [Job((7, row), row, 10) for row in range(30)]
    params = SamplingParams(max_answer_tokens=40)

    def run(jobs: list[Job], max_tokens: int) -> tuple[dict[int, Sampled], slots.Counts]:
        with torch.inference_mode(), model.evaluating():
            one = Slots(model, jobs, params, max_tokens=max_tokens)
            return {index: answer for part in one.run() for index, answer in part.items()}, one.counts

    monkeypatch.setattr(slots, "ROOM", 4)
    expected, _ = run([long, *short], 10**6)
    queue = Slots._joining
    monkeypatch.setattr(Slots, "_joining", lambda self, stay: queue(self, stay)[: 4 if not stay else None])
    monkeypatch.setattr(slots, "_order", lambda row: (row.index,) if not row.ids else (10**6,))  # the long one begins
    found, counts = run([long, *short], 150)
    assert_same([found[index] for index in range(31)], [expected[index] for index in range(31)])
    assert counts.evictions >= 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("budget", [60, None])
def test_ends_are_looked_for_every_few_tokens(
    name: str, budget: int | None, architecture: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where to look is to wait: what a row draws behind its end is nobody's, and moves nothing. A row at
    the last position that a model has stays there while others go on."""
    model = model_of(architecture, name)
    prompts = [*PROMPTS[:8], *([3 + row] * 48 for row in range(4))]  # with 48 tokens: all 96 positions
    expected = HFEngine(model).sample(prompts, SEEDS, PARAMS)
    monkeypatch.setitem(slots.STEPS_AT_ONCE, "cpu", 5)
    monkeypatch.setattr(slots, "ROOM", 8)
    assert_same(HFEngine(model, max_tokens_per_batch=budget).sample(prompts, SEEDS, PARAMS), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_are_read_in_pieces(name: str, architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(architecture, name)
    prompts = [[(7 * row + place) % 38 for place in range(4 + 3 * row)] for row in range(6)]
    expected = HFEngine(model).sample(prompts, SEEDS[:6], PARAMS)
    monkeypatch.setattr(decode, "READ_TOKENS", 24)  # four columns at once
    assert_same(HFEngine(model).sample(prompts, SEEDS[:6], PARAMS), expected)


def test_a_head_that_is_filled_up_draws_the_same(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for params in (
        PARAMS,
        SamplingParams(max_answer_tokens=8, top_p=0.8),
        SamplingParams(max_answer_tokens=8, temperature=0),
    ):
        model = model_of(architecture, "qwen3")
        expected = HFEngine(model).sample(PROMPTS, SEEDS, params)
        with monkeypatch.context() as patched:
            patched.setitem(ROW_MULTIPLE, "cpu", 64)
            assert_same(HFEngine(model).sample(PROMPTS, SEEDS, params), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_answer_tokens=4),
        SamplingParams(max_answer_tokens=4, temperature=0),
        SamplingParams(max_answer_tokens=4, top_k=5),
        SamplingParams(max_answer_tokens=4, top_p=0.9),
        SamplingParams(max_answer_tokens=4, min_p=0.1),
    ],
)
def test_logits_that_are_no_numbers_are_a_sentence(bad: float, params: SamplingParams, architecture: Make) -> None:
    """On CUDA the draw would read beyond an array, after which not even a checkpoint can be written."""
    for size in (48, 4096):
        model = LanguageModel(*architecture("llama", vocab_size=size))
        with torch.no_grad():
            model.module.lm_head.weight[7] = bad
        with pytest.raises(UserError, match=r"no finite numbers .* earlier checkpoint"):
            HFEngine(model).sample(PROMPTS, SEEDS, params)


def test_what_is_whole_is_handed_out_before_a_stop(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is heard after a token; what has ended by then comes first, each answer once and as it always is."""
    model = model_of(architecture, "qwen3")
    expected = HFEngine(model).sample(PROMPTS, SEEDS, PARAMS)
    for after in (1, 9, 20, 10**6):
        got: dict[int, Sampled] = {}
        calls = 0

        def progress(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            assert 0 <= done <= total == 12
            if calls >= after:  # noqa: B023
                raise Interrupted

        def finished(answers: Mapping[int, Sampled]) -> None:
            assert not got.keys() & answers.keys()  # noqa: B023
            got.update(answers)  # noqa: B023

        monkeypatch.setattr(slots, "ROOM", 8)
        engine = HFEngine(model, max_tokens_per_batch=60)
        if after < 10**6:
            with pytest.raises(Interrupted):
                engine.sample(PROMPTS, SEEDS, PARAMS, progress, finished)
            assert calls == after, "at once"
        else:
            engine.sample(PROMPTS, SEEDS, PARAMS, progress, finished)
            assert len(got) == 12
        assert_same(list(got.values()), [expected[index] for index in got])


def test_memory_for_keys_and_values(architecture: Make) -> None:
    """Two layers of two heads of 8 numbers, keys and values, 4 bytes each; budgets come in powers of two."""
    assert memory.bytes_per_token(model_of(architecture, "qwen3")) == 2 * 2 * 8 * 2 * 4
    assert memory.cached_tokens(model_of(architecture, "qwen3")) == memory.TOKENS_PER_BATCH == 65536
    assert memory.tokens_in(70 * 2**30, 115_000) == 8 * 65536  # an H200 with Qwen3-1.7B
    assert memory.tokens_in(1, 115_000) == 65536


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    ],
)
def test_no_memory_is_a_sentence(error: Exception, architecture: Make) -> None:
    model = model_of(architecture, "qwen3")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    model.body.register_forward_pre_hook(fails)
    with pytest.raises(UserError, match=r"out of memory while sampling .*lower max_tokens_per_batch.*--resume"):
        HFEngine(model).sample(PROMPTS, SEEDS, PARAMS)
    with pytest.raises(UserError, match="out of memory while scoring"):
        HFEngine(model).score([[5]], [[7]], Asked("sampled"))


def test_hidden_states_are_read_where_the_head_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture's states lie in host memory and its head on the accelerator; `meta` stands in for that here."""
    seen = []

    def stats(hidden_NH: torch.Tensor, head: Head, **asked: Any) -> HeadStats:
        seen.append((hidden_NH.device.type, asked["sampled_ids_N"].device.type))
        numbers_N = torch.zeros(len(hidden_NH))
        return HeadStats(sampled_logprob_N=numbers_N, topk_ids_NK=None, topk_logprob_NK=None, entropy_N=numbers_N)

    monkeypatch.setattr(scoring, "head_stats", stats)
    head = Head(weight_VH=torch.zeros(9, 4, device="meta"), num_tokens=9)
    signals_of(torch.zeros(3, 4), head, [[1, 2, 3]], Asked("sampled", entropy=True), 1.0)
    assert seen == [("meta", "meta")]
