"""Texts that end an answer: where in the tokens, the same however many are drawn at once, and what cannot be one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.contexts.render import Renderer
from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.sampling import slots
from opdkit.engines.scratch import bpe_tokenizer
from opdkit.engines.tokens.stop_strings import StopStrings
from opdkit.errors import UserError
from opdkit.evaluation.episodes import check_stage
from opdkit.recipe.episode import EpisodeSection

TEMPLATES = Path(__file__).parent.parent / "contexts" / "chat_templates"
SAID = "Thought: 1 é ü\nAction: look\nObservation: more"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = bpe_tokenizer(["Thought Action Observation look: "], 300)
    made.add_tokens(["</call>"])
    return made


@pytest.mark.parametrize("text", ["Observation:", "ü\nA", "é", "\n", "more", "</call>"])
def test_an_answer_ends_with_the_token_that_completes_it(tokenizer: Any, text: str) -> None:
    """Found by decoding every beginning, whatever was looked at before, and not where only a part is written."""
    ids = tokenizer.encode(f"{SAID}</call> on", add_special_tokens=False)
    decoded = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    expected = next(end for end, beginning in enumerate(decoded) if text in beginning)
    for begun in range(expected):
        assert StopStrings(tokenizer, ("never", text)).end(ids, begun) == expected
    assert StopStrings(tokenizer, (text,)).end(ids[: expected - 1]) is None
    assert StopStrings(tokenizer, ()).end(ids) is None


@pytest.fixture
def steps() -> Iterator[None]:
    yield
    slots.STEPS_AT_ONCE.pop("cpu", None)


def test_sampled_answers_end_there(tiny_model: LanguageModel, steps: None) -> None:
    """The same tokens and log-probs as without it, up to the text; where several tokens are drawn before anybody looks,
    too, and where an answer is carried on in a second pass that reads its beginning."""
    engine, params = HFEngine(tiny_model), SamplingParams(max_answer_tokens=12, temperature=1.3)
    prompts, seeds = [[5, 6, 7], [9, 10], [20]], [1, 2, 3]
    whole = engine.sample(prompts, seeds, params)
    longest = max(whole, key=lambda answer: len(answer.answer_ids))
    text = tiny_model.tokenizer.decode(longest.answer_ids[3:6])
    strings = StopStrings(tiny_model.tokenizer, (text,))
    for at_once, switch in ((1, None), (16, None), (16, 6)):
        slots.STEPS_AT_ONCE["cpu"] = at_once
        tiny_model.switch_length = switch
        cut = engine.sample(prompts, seeds, replace(params, stop=(text,)))
        tiny_model.switch_length = None
        for answer, before in zip(cut, whole, strict=True):
            end = strings.end(before.answer_ids)
            assert answer.answer_ids == before.answer_ids[:end]
            np.testing.assert_allclose(answer.logprobs_T, before.logprobs_T[:end], atol=1e-5)
            assert answer.finish == ("stop" if end else before.finish)
    assert strings.end(longest.answer_ids) == 6


@pytest.mark.parametrize(
    ("stop", "said"), [("<tool_call>", "every call"), ('"arguments"', "every call"), ("\x00☃", "cannot write")]
)
def test_what_no_turn_could_end_with(tmp_path: Path, stop: str, said: str) -> None:
    """A text in the middle of every call, and one that the tokenizer has no ids for."""
    words = bpe_tokenizer(["words"], 300)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if "cannot" in said:
        words.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("☃", "")
    renderer = Renderer(words, (TEMPLATES / "tools_thinking.jinja").read_text())
    end = frozenset([words.convert_tokens_to_ids("<|im_end|>")])
    with pytest.raises(UserError, match=said):
        check_stage(EpisodeSection(environment="calculator", stop=(stop,)), (renderer, end), {})


def test_empty_texts_and_very_many_are_refused() -> None:
    for stop in ([""], ["x" * 201], ["x"] * 17):
        with pytest.raises(ValueError, match="stop"):
            EpisodeSection.model_validate({"environment": "calculator", "stop": stop})
