"""Chat templates of the kinds that models ship with: how a turn ends, what a keyword does, which day it is, and what a
template drops. Small templates of our own; no model's own template is tested here."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from opdkit.contexts.blocks import without_thinking
from opdkit.contexts.render import Renderer, read_kwargs
from opdkit.contexts.template_text import variables_of, with_date
from opdkit.errors import UserError
from opdkit.tasks.base import Grade
from opdkit.tasks.final_text import after_thinking, final_channel
from opdkit.tasks.guard import make_task, task_named
from opdkit.types import Problem

TEMPLATES = Path(__file__).parent / "chat_templates"
MARKUP = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|start|>", "<|message|>",
    "<|channel|>", "<|end|>", "<|return|>", "<|END_RESPONSE|>", "<|END_OF_TURN|>", "<|system|>", "<|user|>",
    "<|assistant|>",
]  # fmt: skip
ASKS = ({"role": "user", "content": "1+1?"},)
LATE = datetime(2026, 12, 31, 23, 59)
HARMONY = (
    "<|channel|>analysis<|message|>It is \\boxed{1}?<|end|><|start|>assistant<|channel|>final<|message|>"
    "It is \\boxed{2}.<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, and the markup of all the templates as special tokens."""
    from opdkit.engines.scratch import bpe_tokenizer

    made = bpe_tokenizer(["some words"], 300)
    made.add_special_tokens({"additional_special_tokens": MARKUP})
    made.eos_token = made.bos_token = "<|endoftext|>"
    return made


def render(tokenizer: Any, name: str, **how: Any) -> Renderer:
    return Renderer(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(), **how)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml_thinking", "<|im_end|>"),
        ("opens_thought", "<|endoftext|>"),
        ("dated_channels", "<|return|>"),
        ("two_closers", "<|END_OF_TURN|>"),
    ],
)
def test_the_end_of_a_turn(tokenizer: Any, name: str, end: str) -> None:
    """What stands behind an assistant's words, whatever the tokenizer calls its end of text."""
    assert render(tokenizer, name).end_of_turn() == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    "template",
    [
        "plain",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",  # writes none
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% endfor %}",  # drops what is said
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    ],
)
def test_templates_without_an_end(tokenizer: Any, template: str) -> None:
    assert Renderer(tokenizer, template).end_of_turn() is None


def test_a_misspelt_keyword_is_refused(tokenizer: Any) -> None:
    """jinja gives it to nobody; so do keywords of transformers' own that a recipe must not set."""
    with pytest.raises(UserError, match=r'reads no enable_thinkin \(did you mean "enable_thinking"\?\)'):
        render(tokenizer, "chatml_thinking", template_kwargs={"enable_thinkin": False})
    with pytest.raises(UserError, match=r"reads no tokenize \(it reads reasoning_effort\)"):
        render(tokenizer, "dated_channels", template_kwargs={"tokenize": True})
    with pytest.raises(UserError, match="reads no enable_thinking"):
        Renderer(tokenizer, "plain", {"enable_thinking": False})
    closed = render(tokenizer, "chatml_thinking", template_kwargs={"enable_thinking": False})
    assert closed.prompt_text(ASKS).endswith("<think>\n\n</think>\n\n")
    assert read_kwargs(closed, {"enable_thinking": True, "other": 1}) == {"enable_thinking": True}


def test_variables() -> None:
    """What a template sets only where it was not given is a setting; what it always sets is its own; macros, loops and
    transformers' own tag are read."""
    template = (
        "{% if not day is defined %}{% set day = 'x' %}{% endif %}{% set own = 1 %}{% macro say(a) %}{{ a + tone }}"
        "{% endmacro %}{% for m in messages %}{% generation %}{{ say(own) + day }}{% endgeneration %}{% endfor %}"
    )
    assert variables_of(template).settings == {"day", "tone"}
    with pytest.raises(UserError, match="not valid jinja"):
        variables_of("{% if %}")


def test_the_date_is_pinned(tokenizer: Any) -> None:
    dated = render(tokenizer, "dated_channels", now=LATE)
    assert dated.reads_clock and "Current date: 2026-12-31\n" in dated.prompt_text(ASKS)
    today = render(tokenizer, "dated_channels").prompt_text(ASKS)
    assert today == render(tokenizer, "dated_channels", now=datetime.now()).prompt_text(ASKS)
    assert not render(tokenizer, "chatml_thinking", now=LATE).reads_clock


@pytest.mark.parametrize(
    "template",
    [
        "\n {{ strftime_now('%d %b %Y, 100%% at %H:%M') }}",
        "  {% if 1 %}a{% endif %}{% set f = '%Y' %}{{ strftime_now(f + '-%m') }}",
        " \n\n {%- if strftime_now is defined %}{{ strftime_now('%-d.%-m.') }}{% endif %}\n",
    ],
)
def test_a_pinned_date_changes_nothing_else(tokenizer: Any, template: str) -> None:
    """White space at the beginning, formats that are put together, `%%`: the same text as without, on the same day."""
    now = datetime.now().replace(second=0, microsecond=0)
    messages = [{"role": "assistant", "content": ""}]
    both = [
        tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
        for text in (template, with_date(template, now))
    ]
    assert both[0] == both[1] or datetime.now().minute != now.minute


def test_a_system_prompt_takes_the_place_of_the_data_s(tokenizer: Any) -> None:
    own = ({"role": "system", "content": "The data's."}, *ASKS)
    asked = render(tokenizer, "chatml_thinking", system="Be brief.")
    assert asked.prompt_text(own) == asked.prompt_text(ASKS)
    assert asked.prompt_text(ASKS).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?")
    assert "The data's." in render(tokenizer, "chatml_thinking", system="").prompt_text(own)
    assert Renderer(tokenizer, "plain", system="Be brief.").prompt_text(ASKS) == "Be brief.\n\n1+1?\n\n"


def test_a_turn_that_is_dropped_is_refused(tokenizer: Any) -> None:
    """Some templates know no system turn and say nothing; those of vision models drop words that are no list."""
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="drops the system turn"):
        Renderer(tokenizer, no_system, system="Be brief.").prompt_text(ASKS)
    with pytest.raises(UserError, match="drops the user turn"):
        Renderer(tokenizer, "{% for m in messages %}{{ m.role }}{% endfor %}").prompt_text(ASKS)


def test_several_templates(tokenizer: Any) -> None:
    """A tokenizer may have several by name: the default one, or one for tools where tools are given."""
    import copy

    several = copy.copy(tokenizer)
    several.chat_template = {
        "default": "D{{ messages[0].content }}",
        "tool_use": "T{{ messages[0].content }}{{ tools }}",
    }
    assert Renderer(several).prompt_text(ASKS) == "D1+1?"
    assert Renderer(several, template_kwargs={"tools": []}).prompt_text(ASKS).startswith("T1+1?")
    several.chat_template = {"rag": "x"}
    with pytest.raises(UserError, match="rag and none named default"):
        Renderer(several).prompt_text(ASKS)


def test_harmony_is_read_in_its_final_channel(tokenizer: Any) -> None:
    """gpt-oss: what it thinks is no answer; an answer that was cut before its final message says nothing."""
    renderer = Renderer(tokenizer)
    assert renderer.answer_text(renderer.encode(HARMONY)) == "It is \\boxed{2}."
    assert renderer.answer_text(renderer.encode(HARMONY.split("<|start|>")[0])) == ""
    assert renderer.answer_text(renderer.encode("plain <|im_end|>words")) == "plain words"
    assert without_thinking(HARMONY) == after_thinking(HARMONY) == final_channel(HARMONY) == "It is \\boxed{2}."
    called = HARMONY.split("<|start|>")[0] + "<|start|>assistant<|channel|>commentary to=f<|message|>{}<|call|>"
    assert final_channel(called) == ""
    for text in ("no markup", "a <|channel|> in words", "<think>x</think> y"):
        assert final_channel(text) == text
    assert final_channel("<|channel|>final<|message|>" * 100_000) == ""


def test_graders_read_the_final_channel() -> None:
    """Thought alone is no answer, though a box stands in it."""
    problem = Problem(id="p", task="math", messages=ASKS, gold="1")
    task = make_task(task_named("math"))
    try:
        right, cut = task.grade([(problem, HARMONY.replace("{2}", "{1}")), (problem, HARMONY.split("<|end|>")[0])])
    finally:
        task.close()
    assert isinstance(right, Grade) and right.score == 1.0
    assert cut.score == 0.0 and cut.verdict == "no_answer"


def test_stop_tokens_that_are_not_special_leave_no_trace(tokenizer: Any) -> None:
    """A fine-tuning tool may add its end of turn as an ordinary token."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<stop>"])
    stop = own.convert_tokens_to_ids("<stop>")
    ids = (*Renderer(own).encode("Answer: 4"), stop)
    assert Renderer(own).answer_text(ids) == "Answer: 4<stop>"
    assert Renderer(own, stop_ids=frozenset({stop})).answer_text(ids) == "Answer: 4"
