"""The fake engine keeps to the same protocols as the real one, so a trainer test with it means something."""

import numpy as np
import torch

from opdkit.engines.base import Sampler, SamplingParams, Scorer
from opdkit.engines.fake import FakeEngine
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.types import Asked


def test_it_answers_in_the_same_shapes_as_the_real_engine(tiny_model: LanguageModel) -> None:
    """Lengths, types and what is None agree with HFEngine for each kind of question; numbers of course do not."""
    fake: Sampler = FakeEngine(lambda prompt, seed: [*prompt, seed % 7, 0], hidden_width=tiny_model.hidden_width)
    sampled = fake.sample([[5, 6], [7]], [3, 4], SamplingParams(max_answer_tokens=3))
    assert [answer.answer_ids for answer in sampled] == [(5, 6, 3), (7, 4, 0)]
    assert [answer.finish for answer in sampled] == ["length", "stop"]
    scorers: list[Scorer] = [FakeEngine(lambda *_: [], hidden_width=tiny_model.hidden_width), HFEngine(tiny_model)]
    kinds = (
        Asked("sampled"),
        Asked("topk", 3),
        Asked("distribution"),
        Asked("distribution", entropy=True),
    )
    for asked in kinds:
        one, other = (engine.score([[5, 6]], [[1, 2, 3, 0]], asked)[0] for engine in scorers)
        for name in ("sampled_logprob_T", "topk_ids_TK", "topk_logprob_TK", "entropy_T", "hidden_TH"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None)
            assert first is None or (first.shape == second.shape and first.dtype == second.dtype)


def test_it_is_deterministic() -> None:
    """Equal questions have equal answers, others have others."""
    fake = FakeEngine(lambda prompt, seed: [seed % 5], logprob=-0.5)
    params = SamplingParams()
    assert fake.sample([[1]], [8], params)[0].answer_ids == fake.sample([[1]], [8], params)[0].answer_ids == (3,)
    np.testing.assert_array_equal(fake.sample([[1]], [8], params)[0].logprobs_T, np.float32([-0.5]))
    asked = Asked("distribution")
    first, again, other = (fake.score([[context]], [[2, 3]], asked)[0].hidden_TH for context in (1, 1, 4))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    fake = FakeEngine(lambda *_: [1])
    fake.sample([[1], [2]], [0, 1], SamplingParams(), lambda *now: seen.append(now))
    fake.score([[1]], [[2]], Asked("sampled"), progress=lambda *now: seen.append(now))
    assert seen == [(1, 2), (2, 2), (1, 1)]
