"""Models from nothing: what `make_model` writes loads as any checkpoint, and its tokenizers lose nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opdkit.engines.scratch import bpe_tokenizer, char_tokenizer, make_model
from opdkit.errors import UserError

SIZES = {"hidden_size": 16, "num_layers": 1, "seed": 3, "max_positions": 32}
BPE = bpe_tokenizer(["the cat sat on the mat, 1234 times", "the hat"], 280)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_checkpoint_loads_as_any_other_and_generates(tmp_path: Path) -> None:
    """Auto classes load the folder; stop ids, limits and the tied head are in the files, not only in memory."""
    tokenizer = char_tokenizer("0123456789+=;")
    make_model(tmp_path / "m", tokenizer=tokenizer, **SIZES)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")

    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.vocab_size == len(loaded) == 5 + 13  # five special tokens, thirteen characters
    stops = GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id
    assert loaded.convert_ids_to_tokens(stops) == ["<e>", "<|endoftext|>"]
    assert loaded.model_max_length == 32 and tokenizer.model_max_length != 32
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == tokenizer.chat_template
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "6604="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # no half-written neighbour


def test_same_seed_same_bytes_and_nobody_elses_randomness(tmp_path: Path) -> None:
    """The seed alone decides the weights; the global generator is neither read nor moved."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    make_model(tmp_path / "a", tokenizer=BPE, **SIZES)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    make_model(tmp_path / "b", tokenizer=BPE, **SIZES)
    make_model(tmp_path / "c", tokenizer=BPE, **{**SIZES, "seed": 4})
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}


def test_bpe_training_is_the_same_in_every_process() -> None:
    """Six pairs are equally frequent, four may be merged: always the same four, in the same order.

    Hash tables are seeded per process, so an order that depended on them would miss this recorded one.
    """
    trained = bpe_tokenizer(["fe ef dc cd ba ab"] * 3, 263).backend_tokenizer
    assert json.loads(trained.to_str())["model"]["merges"] == [["a", "b"], ["b", "a"], ["c", "d"], ["d", "c"]]


@given(st.text())
def test_bpe_round_trips_any_text(text: str) -> None:
    """Every byte is a token, so nothing is lost: emoji, NUL, spaces before punctuation, unknown scripts."""
    assert BPE.decode(BPE.encode(text)) == text


def test_bpe_round_trips_awkward_text_and_keeps_digits_apart() -> None:
    text = "a , b ! \n\n\tx\x00 漢字 🎉 e\u0301 \u00e9 <|im_start|>"
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.tokenize("1234") == ["1", "2", "3", "4"]


def test_char_tokenizer_costs_one_token_a_character_and_refuses_strangers() -> None:
    """A character outside the alphabet raises instead of vanishing."""
    tokenizer = char_tokenizer("0123456789+=;\n")
    ids = tokenizer.encode("66\n04=")
    assert len(ids) == 6 and tokenizer.decode(ids) == "66\n04="
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("66?04=")


CHAT = [
    {"role": "system", "content": "0"},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3"},
]


def test_chat_templates_by_hand() -> None:
    """Several turns, with and without the generation prompt, written out in full; an unknown role is refused."""
    char = char_tokenizer("0123456789")
    render = {"tokenize": False}
    assert char.apply_chat_template(CHAT, **render) == "<s>0<u>1<a>2<e><u>3"
    assert char.apply_chat_template(CHAT, add_generation_prompt=True, **render) == "<s>0<u>1<a>2<e><u>3<a>"
    chatml = (
        "<|im_start|>system\n0<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3<|im_end|>\n"
    )
    assert BPE.apply_chat_template(CHAT, **render) == chatml
    assert BPE.apply_chat_template(CHAT, add_generation_prompt=True, **render) == chatml + "<|im_start|>assistant\n"
    for tokenizer in (char, BPE):
        with pytest.raises(Exception, match="not tool"):
            tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], **render)


@pytest.mark.parametrize("tokenizer", [char_tokenizer("0123456789"), BPE], ids=["char", "bpe"])
def test_the_answer_a_model_writes_is_the_answer_the_template_writes(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """generation prompt + answer + eos is a prefix of the rendered assistant turn, token for token."""
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT[:3])["input_ids"]
    answer = tokenizer.encode("2", add_special_tokens=False)
    assert whole[: len(prompt) + 2] == [*prompt, *answer, tokenizer.eos_token_id]


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    char = char_tokenizer("01")
    with pytest.raises(UserError, match=r"multiple of 8.*try 24"):
        make_model(tmp_path / "m", tokenizer=char, **{**SIZES, "hidden_size": 21})
    with pytest.raises(UserError, match="num_layers is 0"):
        make_model(tmp_path / "m", tokenizer=char, **{**SIZES, "num_layers": 0})
    with pytest.raises(UserError, match="max_positions is 1"):
        make_model(tmp_path / "m", tokenizer=char, **{**SIZES, "max_positions": 1})
    with pytest.raises(UserError, match="at least 259 tokens"):
        bpe_tokenizer(["a"], 100)
    with pytest.raises(UserError, match="at least one character"):
        char_tokenizer("")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="already exists"):
        make_model(tmp_path / "m", tokenizer=char_tokenizer("01"), **SIZES)
    assert list((tmp_path / "m").iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk half-way through: one sentence, and neither a folder nor a partial neighbour."""
    tokenizer = char_tokenizer("01")

    def full_disk(self: object, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        make_model(tmp_path / "m", tokenizer=tokenizer, **SIZES)
    assert list(tmp_path.iterdir()) == []
