"""What `HFEngine.sample` promises: rows that depend on nothing but themselves, and log-probs of what was drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.sampling.draw import Uniforms, draw, kept_entries
from opdkit.errors import UserError
from opdkit.types import Asked, seed_from

Make = Callable[..., tuple[Any, Any]]
ARCHITECTURES = ["cohere", "gemma2", "gemma3", "gpt2", "granite", "llama", "qwen3", "qwen3_moe"]
UNFILTERED = SamplingParams(max_answer_tokens=16, temperature=1.3)
FILTERED = SamplingParams(max_answer_tokens=16, temperature=0.8, top_k=9, top_p=0.9, min_p=0.02)


def prompts_and_seeds(count: int = 12) -> tuple[list[list[int]], list[int]]:
    """Ragged prompts, each with three siblings that have their own seeds."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 38, rng.integers(1, 20)).tolist() for _ in range(count // 3)]
    return [prompts[i % len(prompts)] for i in range(count)], [seed_from("test", i) for i in range(count)]


def assert_same(some: Sequence[Sampled], others: Sequence[Sampled]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.answer_ids == other.answer_ids and one.finish == other.finish
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=1e-5, rtol=1e-5)


# Rows


@pytest.mark.parametrize(
    ("name", "params"), [*((name, UNFILTERED) for name in ARCHITECTURES), ("qwen3", FILTERED), ("gemma2", FILTERED)]
)
def test_a_row_does_not_depend_on_its_batch(name: str, params: SamplingParams, architecture: Make) -> None:
    """Some one by one, all together, reversed, and in batches of a few: the same text and log-probs; so siblings that
    share the pass over their prompt equal rows that do not, and rows that stay when others leave are not disturbed.

    Texts are equal because no number here falls within rounding of a boundary; nothing can promise that for every seed.
    """
    model = LanguageModel(*architecture(name))
    model.stop_ids = frozenset({0, 1, 5, 9, 13})  # so that many rows leave early
    engine = HFEngine(model)
    prompts, seeds = prompts_and_seeds()
    together = engine.sample(prompts, seeds, params)
    for row in (0, 3, 4, 8):
        assert_same(together[row : row + 1], engine.sample(prompts[row : row + 1], seeds[row : row + 1], params))
    assert_same(together, engine.sample(prompts[::-1], seeds[::-1], params)[::-1])
    assert_same(together, HFEngine(model, max_tokens_per_batch=110).sample(prompts, seeds, params))
    assert len({answer.answer_ids for answer in together}) == len(prompts), "siblings have their own seeds"
    assert {answer.finish for answer in together} == {"stop", "length"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_the_scorers(name: str, architecture: Make) -> None:
    """Unfiltered, the sampler's log-probs (cached, left-padded, one token at a time) equal the scorer's (one pass,
    right-padded) and those of the bare module on each row alone."""
    module, tokenizer = architecture(name)
    engine = HFEngine(LanguageModel(module, tokenizer))
    prompts, seeds = prompts_and_seeds()
    answers = engine.sample(prompts, seeds, UNFILTERED)
    signals = engine.score(
        prompts, [a.answer_ids for a in answers], Asked("sampled"), temperature=UNFILTERED.temperature
    )
    for prompt, answer, signal in zip(prompts, answers, signals, strict=True):
        np.testing.assert_allclose(answer.logprobs_T, signal.sampled_logprob_T, atol=1e-5)
        with torch.no_grad():
            own = module(input_ids=torch.tensor([[*prompt, *answer.answer_ids]])).logits[0, len(prompt) - 1 : -1, :38]
        own = (own / UNFILTERED.temperature).log_softmax(-1).gather(1, torch.tensor(answer.answer_ids)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs_T, own, atol=2e-5)


def test_answers_end_with_their_stop_token(tiny_model: LanguageModel) -> None:
    """The stop token is part of the answer, with its log-prob, also where it is the padding id; nothing follows it."""
    prompts, seeds = prompts_and_seeds(60)
    answers = HFEngine(tiny_model).sample(prompts, seeds, UNFILTERED)
    ends = {answer.answer_ids[-1] for answer in answers if answer.finish == "stop"}
    assert ends == {0, 1}
    for answer in answers:
        stops = [token in tiny_model.stop_ids for token in answer.answer_ids]
        assert len(answer.logprobs_T) == len(answer.answer_ids) and (answer.logprobs_T < 0).all()
        assert answer.logprobs_T.dtype == np.float32
        assert stops == [False] * (len(stops) - 1) + [answer.finish == "stop"]
        assert answer.finish == "stop" or len(stops) == UNFILTERED.max_answer_tokens


def test_ids_beyond_the_tokenizer_do_not_exist(tiny_folder: Path) -> None:
    """The ten padded rows of the embedding are made by far the likeliest: never sampled, no mass lost to them."""
    model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    prompts, seeds = prompts_and_seeds()
    before = HFEngine(model).sample(prompts, seeds, UNFILTERED)
    with torch.no_grad():
        model.module.model.embed_tokens.weight[38:] *= 50
    assert_same(HFEngine(model).sample(prompts, seeds, UNFILTERED), before)


def test_greedy(tiny_model: LanguageModel) -> None:
    """Temperature 0 takes the likeliest token, as `generate` does; certain draws have log-prob 0."""
    prompts, seeds = prompts_and_seeds()
    params = SamplingParams(max_answer_tokens=12, temperature=0.0)
    answers = HFEngine(tiny_model).sample(prompts, seeds, params)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        own = tiny_model.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=list(range(38, 48)),
        )
        assert tuple(own[0, len(prompt) :].tolist()) == answer.answer_ids
        assert (answer.logprobs_T == 0).all()


def test_other_weights(tiny_folder: Path, tiny_model: LanguageModel) -> None:
    """An engine with stand-in weights samples and scores as a model that has them; the module keeps its bits."""
    other = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(0.8)
    weights = {name: p.detach().clone() for name, p in other.module.named_parameters()}
    before = {name: p.detach().clone() for name, p in tiny_model.module.named_parameters()}
    prompts, seeds = prompts_and_seeds()
    borrowed = HFEngine(tiny_model, weights=weights).sample(prompts, seeds, UNFILTERED)
    assert_same(borrowed, HFEngine(other).sample(prompts, seeds, UNFILTERED))
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.module.named_parameters())


def test_training_goes_on_after_sampling(tiny_folder: Path) -> None:
    """Sampling leaves no inference tensors behind and puts the mode back, with checkpointing on too."""
    model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    prompts, seeds = prompts_and_seeds()
    expected = HFEngine(model).sample(prompts, seeds, UNFILTERED)
    model.checkpoint_activations()
    model.module.train()
    assert_same(HFEngine(model).sample(prompts, seeds, UNFILTERED), expected)
    assert model.module.training and model.module.model.layers[0].training
    model.hidden([[1, 2]], [[3, 4]]).sum().backward()


def test_bfloat16(tiny_folder: Path) -> None:
    """In bfloat16 log-probs are still float32 numbers of what was drawn: within bfloat16's rounding of the scorer's."""
    engine = HFEngine(LanguageModel.load(tiny_folder, dtype=torch.bfloat16, device="cpu"))
    prompts, seeds = prompts_and_seeds()
    answers = engine.sample(prompts, seeds, UNFILTERED)
    signals = engine.score(prompts, [a.answer_ids for a in answers], Asked("sampled"), temperature=1.3)
    for answer, signal in zip(answers, signals, strict=True):
        np.testing.assert_allclose(answer.logprobs_T, signal.sampled_logprob_T, atol=0.15)


def test_progress_counts_finished_answers(tiny_model: LanguageModel) -> None:
    prompts, seeds = prompts_and_seeds(30)
    seen: list[tuple[int, int]] = []
    HFEngine(tiny_model, max_tokens_per_batch=400).sample(prompts, seeds, UNFILTERED, lambda *now: seen.append(now))
    counts = [count for count, _ in seen]
    assert counts == sorted(counts) and counts[-1] == 30 and {total for _, total in seen} == {30}
    assert len(set(counts)) > 5


def test_nothing_to_sample(tiny_model: LanguageModel) -> None:
    assert HFEngine(tiny_model).sample([], [], UNFILTERED) == []


def test_refusals(tiny_model: LanguageModel) -> None:
    """Rows that could outgrow the model's positions, and parameters out of range, before anything is computed."""
    engine = HFEngine(tiny_model)
    with pytest.raises(UserError, match=r"row 1 needs 97 positions \(prompt and max_answer_tokens = 16\)"):
        engine.sample([[2] * 80, [2] * 81], [0, 1], UNFILTERED)
    for change in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.5}, {"max_answer_tokens": 0}):
        with pytest.raises(UserError, match=f"sampling.{next(iter(change))}"):
            engine.sample([[2]], [0], SamplingParams(**change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        engine.sample([[]], [0], UNFILTERED)


# Draws


def warped(scores_BV: Tensor, params: SamplingParams) -> Tensor:
    """Log-probs of transformers' own chain, the reference for order and edges of the filters."""
    steps: list[Any] = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    steps += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    return LogitsProcessorList(steps)(torch.empty(0), scores_BV).log_softmax(-1)


@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8},
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 200, "top_p": 0.99, "min_p": 0.001},
        {"top_k": 1},
        {"top_p": 1e-6},
    ],
)
def test_filters_are_those_of_transformers(cut: dict[str, Any], size: int) -> None:
    """Kept entries and their renormalised log-probs equal transformers' warpers; kept mass sums to one; a drawn token
    is a kept one and comes with its log-prob. Peaked and flat rows, so that top-p looks at few and at all entries."""
    params = SamplingParams(temperature=0.7, **cut)
    spread_B1 = torch.linspace(0.01, 6, 32)[:, None]
    logits_BV = torch.randn(32, size, generator=torch.Generator().manual_seed(1)) * spread_B1
    expected_BV = warped(logits_BV.clone(), params)
    scores_BK, ids_BK = kept_entries(logits_BV / 0.7, params)
    ours_BV = torch.full((32, size), -torch.inf)
    ids_BK = torch.arange(size).expand(32, -1) if ids_BK is None else ids_BK
    kept_BK = scores_BK > -torch.inf
    ours_BV[kept_BK.nonzero()[:, 0], ids_BK[kept_BK]] = scores_BK.log_softmax(-1)[kept_BK]
    torch.testing.assert_close(ours_BV.exp(), expected_BV.exp(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours_BV.exp().sum(-1), torch.ones(32))
    token_B, logprob_B = draw(logits_BV / 0.7, Uniforms(range(32), torch.device("cpu")).next(), params)
    torch.testing.assert_close(logprob_B, expected_BV.gather(1, token_B[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    assert logprob_B.isfinite().all()


def test_frequencies() -> None:
    """Chi-square of 40,000 draws from a known distribution of five tokens, one of them impossible (fixed seeds, 4
    degrees of freedom less one: 99.9 % of honest samplers stay below 16.3), and of the filtered one."""
    probability = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    draws = 40_000
    uniform_B1 = Uniforms(range(draws), torch.device("cpu")).next()
    for params, expected in (
        (SamplingParams(), probability),
        (SamplingParams(top_k=3, top_p=0.7), torch.tensor([2 / 3, 1 / 3, 0.0, 0.0, 0.0])),
    ):
        token_B, logprob_B = draw(probability.log().repeat(draws, 1), uniform_B1, params)
        count = torch.bincount(token_B, minlength=5)
        possible = expected > 0
        assert (count[~possible] == 0).all()
        want = expected[possible] * draws
        assert ((count[possible] - want).square() / want).sum() < 16.3
        torch.testing.assert_close(logprob_B, expected.log()[token_B], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [5, 2048, 2049, 30_000])
def test_a_draw_inverts_the_exact_cumulative_distribution(size: int) -> None:
    """Token = first id whose cumulative mass (numpy, float64) exceeds the number, on both sides of the size where it is
    found in two steps. Half of the ids are impossible, most are rarer than float32 resolves next to 1."""
    rng = np.random.default_rng(0)
    mass_BV = np.exp(rng.normal(-15, 4, (400, size))) * (rng.random((400, size)) < 0.5)
    mass_BV[:200, -1] = mass_BV[200:, 0] = 1.0
    uniform_B1 = rng.random((400, 1))
    rare_B1 = 1 - 1 / mass_BV[200:].sum(1, keepdims=True)
    uniform_B1[200:] = 1 - rare_B1 * uniform_B1[200:]  # after the likely id, among all the rare ones
    uniform_B1 = np.minimum(uniform_B1, 1 - 2.0**-53)  # the largest number a stream gives
    uniform_B1[0], uniform_B1[1] = 0.0, 1 - 2.0**-53
    scores_BV = torch.from_numpy(mass_BV).float().log()
    cumulative_BV = scores_BV.double().exp().cumsum(-1)
    token_B, logprob_B = draw(scores_BV, torch.from_numpy(uniform_B1), SamplingParams())
    target_B1 = torch.from_numpy(uniform_B1) * cumulative_BV[:, -1:]
    expected_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    assert (token_B != expected_B).sum() <= 2, "float32 masses differ by 1e-7; few numbers in 400 meet a boundary"
    assert logprob_B.isfinite().all(), "an impossible id was drawn"


def test_streams_belong_to_rows() -> None:
    """A row's t-th number is the t-th of its seed's Philox stream, whoever else is there, leaves or joins."""
    cpu = torch.device("cpu")
    stream = np.random.Generator(np.random.Philox(key=7))
    together, changing, alone = Uniforms([5, 6, 7], cpu), Uniforms([5, 6, 7], cpu), Uniforms([7], cpu)
    for position in range(150):
        numbers = together.next()
        assert ((numbers >= 0) & (numbers < 1)).all() and len(set(numbers[:, 0].tolist())) == 3
        assert torch.equal(numbers[2:], alone.next()) and numbers[2].item() == stream.random()
        if position == 40:
            changing.change([2, 0])
        if position == 90:
            changing.change([0, 1], [(6, 90)])
        rows = [0, 1, 2] if position < 40 else [2, 0] if position < 90 else [2, 0, 1]
        assert torch.equal(changing.next(), numbers[rows])
