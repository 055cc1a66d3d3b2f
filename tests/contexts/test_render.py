"""Messages to ids and ids to text: one generation prompt, one beginning of text, and no guessing of templates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit.contexts.render import LongPrompt, Renderer, long_prompts, read_chat_template
from opdkit.errors import UserError

Make = Callable[[], Any]
MESSAGES = ({"role": "user", "content": "1+1="},)
END, TURN, USER, ASSISTANT = 0, 1, 2, 3  # special ids of the tiny tokenizer; "0" is 5, "+" 15, "=" 18, "?" 23


def llama_like(tiny_tokenizer: Make) -> Any:
    """A tokenizer that puts <turn> (id 1) in front of everything it encodes, with a template that writes it as well."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<turn>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<turn> $A", special_tokens=[("<turn>", TURN)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def test_by_hand(tiny_tokenizer: Make) -> None:
    """The template's text, character by character, and the assistant's opening behind it."""
    assert Renderer(tiny_tokenizer()).prompt_ids(MESSAGES) == (USER, 6, 15, 6, 18, ASSISTANT)


def test_same_ids_as_transformers(tiny_tokenizer: Make) -> None:
    """Parity with apply_chat_template(tokenize=True), which transformers 5 returns as a dictionary."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "abc"}, *MESSAGES, {"role": "assistant", "content": "2"}, *MESSAGES]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(Renderer(tokenizer).prompt_ids(messages)) == theirs["input_ids"]


def test_ids_of_a_text_are_the_tokenizer_s(tiny_tokenizer: Make) -> None:
    """Also of one that cuts or splits what it reads, or does more than the library's `encode`."""
    tokenizer = tiny_tokenizer()

    def both(text: str) -> list[Any]:
        return [Renderer(tokenizer).encode(text), tuple(tokenizer(text, add_special_tokens=False)["input_ids"])]

    assert both("1<end>") == [(6, END)] * 2
    tokenizer("1+1=", truncation=True, max_length=2)  # it stays set up so
    assert both("1+1=") == [(6, 15, 6, 18)] * 2
    tokenizer.split_special_tokens = True
    with pytest.raises(UserError):
        Renderer(tokenizer).encode("1<end>")  # "<" is none of its characters

    class Own(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return {"input_ids": [7]}

    tokenizer.__class__ = Own
    assert both("1") == [(7,), (7,)]


def test_one_beginning_of_text(tiny_tokenizer: Make) -> None:
    """A Llama-type tokenizer adds it on its own and the template writes it too: there is one, never two (the published
    code has two). Text without a template has the one the tokenizer would add; answers have none."""
    tokenizer = llama_like(tiny_tokenizer)
    assert tokenizer("1")["input_ids"] == [TURN, 6]
    assert Renderer(tokenizer).prompt_ids(MESSAGES) == (TURN, USER, 6, 15, 6, 18, ASSISTANT)
    assert Renderer(tokenizer, chat_template="plain").prompt_ids(MESSAGES)[:2] == (TURN, 6)
    assert Renderer(tokenizer).encode("1") == (6,)


def test_template_kwargs_reach_the_template(tiny_tokenizer: Make) -> None:
    """Student and teacher may differ in them (`enable_thinking`)."""
    tokenizer = tiny_tokenizer()
    thinking = Renderer(tokenizer, template_kwargs={"enable_thinking": True})
    assert thinking.prompt_ids(MESSAGES) == (*Renderer(tokenizer).prompt_ids(MESSAGES), 23)


def test_thinking_is_closed_where_the_template_opens_it(tiny_tokenizer: Make) -> None:
    """PW-OPSD's prompt for students of R1's kind. Only what the template writes last counts, not a message's text, and
    a template that opens nothing is left alone."""
    tokenizer = tiny_tokenizer()
    opening = tokenizer.chat_template + "{% if add_generation_prompt %}<think>\n{% endif %}"
    plain, closed = Renderer(tokenizer, opening), Renderer(tokenizer, opening, close_thinking=True)
    assert closed.prompt_text(MESSAGES) == plain.prompt_text(MESSAGES) + "</think>\n\n"
    asks = ({"role": "user", "content": "<think>"},)
    assert Renderer(tokenizer, close_thinking=True).prompt_text(asks) == Renderer(tokenizer).prompt_text(asks)


def test_plain(tiny_tokenizer: Make) -> None:
    """Contents joined by blank lines, and a blank line before the answer; no chat markup, no template needed."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    plain = Renderer(tokenizer, chat_template="plain")
    messages = ({"role": "system", "content": "abc"}, *MESSAGES)
    assert plain.prompt_text(messages) == "abc\n\n1+1=\n\n"
    assert plain.prompt_ids(messages) == plain.encode("abc\n\n1+1=\n\n")


def test_no_template_is_refused(tiny_tokenizer: Make) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r'no chat template.* to the path of a jinja file, or to "plain"'):
        Renderer(tokenizer).prompt_ids(MESSAGES)


def test_a_template_that_refuses(tiny_tokenizer: Make) -> None:
    """Templates raise for roles they do not know; the sentence says which roles and why."""
    template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(UserError, match=r"roles system, user \(no system role here\)"):
        Renderer(tiny_tokenizer(), template).prompt_ids([{"role": "system", "content": "a"}, *MESSAGES])
    with pytest.raises(UserError, match="chat template"):
        Renderer(tiny_tokenizer(), "{% if %}").prompt_ids(MESSAGES)


def test_template_files(tmp_path: Path, tiny_tokenizer: Make) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[-1].content }}#")
    assert read_chat_template(None) is None
    assert read_chat_template("plain") == "plain"
    template = read_chat_template(str(file))
    assert Renderer(tiny_tokenizer(), template).prompt_text(MESSAGES) == "1+1=#"
    with pytest.raises(UserError, match=r"chat_template = .*absent.jinja.* is not a readable file"):
        read_chat_template(str(tmp_path / "absent.jinja"))


def test_answer_text(tiny_tokenizer: Make) -> None:
    """Special tokens are left out, spaces and line breaks stay as they are."""
    renderer = Renderer(tiny_tokenizer())
    ids = renderer.encode(" 2 , 3\n!")
    assert renderer.answer_text((*ids, TURN, END)) == " 2 , 3\n!"
    assert renderer.answer_text(()) == ""


def test_cut() -> None:
    """A text is cut at a token boundary of itself: the rest is a prefix, never more tokens than asked for, and the
    number of tokens cut is told. Bytes of one character stay together."""
    from opdkit.engines.scratch import bpe_tokenizer

    renderer = Renderer(bpe_tokenizer(["the theme of the thesis"] * 5, 290))
    text = "the theme 你好 of the thesis"
    length = len(renderer.encode(text))
    for limit in range(length + 2):
        kept, num_cut = renderer.cut(text, limit)
        assert text.startswith(kept) and num_cut == max(0, length - limit)
        assert len(renderer.encode(kept)) <= limit
        assert kept == text or limit < length
    assert renderer.cut(text, 0) == ("", length)


def test_long_prompts_are_reported_not_cut() -> None:
    prompts = [("a", [1] * 5), ("b", [1] * 6), ("c", [1] * 9)]
    assert long_prompts(prompts, limit=5) == [
        LongPrompt(problem_id="b", num_tokens=6, limit=5),
        LongPrompt(problem_id="c", num_tokens=9, limit=5),
    ]


def test_no_torch() -> None:
    """Saved rows are rendered and graded on machines without torch."""
    import subprocess
    import sys

    code = "import sys, opdkit.contexts.render; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
