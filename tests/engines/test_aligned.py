"""Two tokenizations of one answer: spans that can be done by hand, and bytes that are exact.

Counts on real tokenizers (docs/guides/another_tokenizer.md) are not repeated here: they need files of megabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdkit.engines.scratch import CHATML_END, bpe_tokenizer, char_tokenizer
from opdkit.engines.tokens.aligned import Alignment, Reading, Span, cut, valid_text
from opdkit.engines.tokens.token_bytes import TokenBytes, encode_plainly, token_bytes
from opdkit.errors import UserError

WOMAN_SCIENTIST = "\U0001f469\u200d\U0001f52c"  # 4 + 3 + 4 bytes


def pieces(data: bytes, *ends: int) -> list[bytes]:
    return [data[start:end] for start, end in zip((0, *ends), ends, strict=False)]


def sizes(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [span.sizes for span in spans]


def side(*tokens: str | bytes, special: Sequence[str] = (), tags: Sequence[str] = ()) -> TokenBytes:
    """A vocabulary written down: text tokens, then special ones, then added ones that readers see."""
    texts = [token.encode() if isinstance(token, str) else token for token in tokens]
    first, end = len(texts), len(texts) + len(special)
    return TokenBytes(
        bytes_V=[*texts, *(None for _ in special), *(tag.encode() for tag in tags)],
        markup=frozenset(range(first, end + len(tags))),
        id_of={text: index for index, text in enumerate(texts)},
        names=dict(enumerate((*special, *tags), first)),
    )


def greedy(vocabulary: TokenBytes, text: str) -> list[int]:
    """The longest token that goes on, as a tokenizer would."""
    data, ids = text.encode(), []
    known = {**vocabulary.id_of, **{name.encode(): i for i, name in vocabulary.names.items() if vocabulary.bytes_V[i]}}
    while data:
        piece = max((piece for piece in known if data.startswith(piece)), key=len)
        ids.append(known[piece])
        data = data[len(piece) :]
    return ids


def alignment(student: TokenBytes, teacher: TokenBytes, **changed: Any) -> Alignment:
    """The end of a turn is each side's first special token."""
    keys = {"ends": tuple(min(one.names) for one in (student, teacher)), "encode": lambda text: greedy(teacher, text)}
    return Alignment(student=student, teacher=teacher, **{**keys, **changed})


DIGITS = side(" is", " ", "2", "0", "1", "4", ".", special=["<end>", "<user>"])
NUMBERS = side(" is", " ", "201", "4", ".", special=["</s>", "<user>"])


def read(student: Sequence[int], **changed: Any) -> Reading:
    return alignment(DIGITS, NUMBERS, **changed).read(student)


def test_spans_are_cut_at_common_ends() -> None:
    text = b" is 2014."
    spans = cut(pieces(text, 3, 4, 5, 6, 7, 8, 9), pieces(text, 3, 4, 7, 8, 9))
    assert sizes(spans) == [(1, 1), (1, 1), (3, 1), (1, 1), (1, 1)]
    assert spans[2] == Span((2, 5), (2, 3))


def test_tokens_of_half_a_character_merge_until_both_sides_agree() -> None:
    """Qwen3 and gpt-oss on the woman scientist."""
    data = WOMAN_SCIENTIST.encode()
    assert sizes(cut(pieces(data, 4, 6, 7, 11), pieces(data, 3, 4, 7, 10, 11))) == [(1, 2), (2, 1), (1, 2)]


def test_nothing_counts_behind_the_first_byte_that_differs() -> None:
    """A teacher whose normaliser joins an accent to its letter (Qwen3): the two agree up to "ok caf"."""
    student = [b"ok ", b"cafe", "\u0301".encode(), b" and so on"]
    assert cut(student, [b"ok ", b"caf", "\u00e9".encode(), b" and so on"]) == [Span((0, 1), (0, 1))]
    assert cut([b"a"], [b"b"]) == cut([], []) == cut([b"a"], []) == []


def test_the_end_of_a_turn_is_one_pair_and_other_specials_are_none() -> None:
    end, user = 7, 8
    whole = read([0, 1, 2, 3, 4, 5, 6, end])
    assert whole.teacher_ids == (0, 1, 2, 3, 4, 5)  # " is", " ", "201", "4", ".", its own end
    assert sizes(whole.spans) == [(1, 1), (1, 1), (3, 1), (1, 1), (1, 1), (1, 1)]
    unpaired = read([0, end], pair_stops=False)
    assert unpaired.teacher_ids == (0,) and sizes(unpaired.spans) == [(1, 1)]
    # The teacher reads nothing of a role token; what is on either side of it is heard, and no span goes across.
    inside = read([0, 1, 2, 3, user, 4, 5])
    assert inside.teacher_ids == (0, 1, 2, 3)
    assert [span.student for span in inside.spans] == [(0, 1), (1, 2), (6, 7)]


def test_answers_without_text() -> None:
    assert read([]) == Reading((), ())
    assert read([7]) == Reading((5,), (Span((0, 1), (0, 1)),))
    assert read([7], pair_stops=False) == Reading((), ())


def test_the_teacher_says_nothing_of_what_it_has_no_room_for() -> None:
    short = alignment(DIGITS, NUMBERS).read([0, 1, 2, 3, 4, 5, 6, 7], room=3)
    assert short.teacher_ids == (0, 1, 2) and [span.student for span in short.spans] == [(0, 1), (1, 2), (2, 5)]


def test_long_spans_say_too_little() -> None:
    letters = side(*"abcdefg", special=["<end>"])
    six, seven = (side("abcdefg"[:n], *"abcdefg", special=["<end>"]) for n in (6, 7))
    assert sizes(alignment(letters, six).read(range(7)).spans) == [(6, 1), (1, 1)]
    assert alignment(letters, seven).read(range(7)).spans == ()


def test_tags_of_a_thought_are_heard_where_both_have_them() -> None:
    """One token on both sides: one token. One token against letters, also where a letter's token goes on behind the
    tag (Llama's ">\\n"): nothing. Tags of tools are no text anywhere."""
    tags = ["<think>", "<tool_call>"]
    tagged, lettered = (
        side("a", "\n", special=["<end>"], tags=tags),
        side("a", "<think", "<tool_call>", ">\n", special=["<e>"]),
    )
    think, tool = 3, 4
    both = alignment(tagged, side("a", "\n", "a\n", special=["<e>"], tags=tags))
    assert [span.student for span in both.read([think, 0, 0, tool, 0]).spans] == [(0, 1), (1, 2), (2, 3), (4, 5)]
    mixed = alignment(tagged, lettered)
    assert mixed.read([0, think, 1, 0]).teacher_ids == (0, 1, 3, 0)
    assert [span.student for span in mixed.read([0, think, 1, 0]).spans] == [(0, 1), (3, 4)]
    assert [span.student for span in mixed.read([tool, 0]).spans] == [(1, 2)]


def test_an_answer_that_stops_inside_a_character_is_read_up_to_it() -> None:
    data = WOMAN_SCIENTIST.encode()
    ours = side("a", data[:4], data[4:6], data[6:7], data[7:], special=["<end>"])
    theirs = side("a", data[:4], data[4:7], data[7:], special=["<end>"])
    cut_short = alignment(ours, theirs).read([0, 1, 2])
    assert cut_short.teacher_ids == (0, 1) and sizes(cut_short.spans) == [(1, 1), (1, 1)]
    broken = alignment(ours, theirs).read([0, 3, 0, 5])  # not UTF-8, and an end that the teacher would read too early
    assert broken.teacher_ids == (0,) and sizes(broken.spans) == [(1, 1)]
    assert valid_text(b"ab\xff") == "ab" and valid_text(b"") == ""


def test_a_text_that_the_teacher_does_not_know_is_not_heard() -> None:
    def refuse(text: str) -> list[int]:
        raise ValueError(text)

    assert read([0, 1], encode=refuse) == Reading((), ())


def test_a_space_that_a_tokenizer_puts_in_front_is_nobodys_token() -> None:
    theirs = side(" a", "b", special=["</s>"])
    found = alignment(side("a", "b", special=["<end>"]), theirs, encode=lambda text: greedy(theirs, " " + text))
    assert found.read([0, 1]).spans == (Span((1, 2), (1, 2)),)
    theirs = side(" ", " a", "b", special=["</s>"])  # an answer that begins with one has two there
    found = alignment(side("a", "b", " ", special=["<end>"]), theirs, encode=lambda text: greedy(theirs, " " + text))
    assert found.read([2, 0, 1, 3]).spans == (Span((2, 3), (2, 3)), Span((3, 4), (3, 4)))


def test_one_vocabulary_under_other_ids_is_read_token_by_token() -> None:
    """Also where the sampled tokens are not those that encoding would write, and specials stand inside."""
    ours, theirs = side("a", "aa", "b", special=["<e>", "<u>"]), side("b", "aa", "a", special=["<u>", "<e>"])
    found = alignment(ours, theirs, ends=(3, 4))
    assert found.is_renumbered and found.teacher_id == {0: 2, 1: 1, 2: 0, 3: 4, 4: 3}
    assert found.read([0, 0, 4, 2, 3]).teacher_ids == (2, 2, 3, 0, 4)
    assert sizes(found.read([0, 0, 4, 2, 3]).spans) == [(1, 1)] * 5
    assert not alignment(DIGITS, NUMBERS).is_renumbered


def test_candidates_are_text_of_the_same_bytes_and_the_pair() -> None:
    assert alignment(DIGITS, NUMBERS).teacher_id == {0: 0, 1: 1, 5: 3, 6: 4, 7: 5}
    assert alignment(DIGITS, NUMBERS, pair_stops=False).teacher_id == {0: 0, 1: 1, 5: 3, 6: 4}


# Bytes of real kinds of tokenizers.

HOSTILE = f"1 {CHATML_END} 2"
TEXTS = ["caf\u00e9 \u4e2d\u6587 \U0001f600\n\n  12345 x\tZ", WOMAN_SCIENTIST, HOSTILE, ""]


def sentencepiece(**keys: Any) -> PreTrainedTokenizerFast:
    """As Gemma has it: spaces are U+2581, unknown characters bytes, runs of spaces added by name."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\n"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<e>", *(f"<0x{b:02X}>" for b in range(256)), *letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", unk_token="<unk>", **keys)
    fast.add_tokens(["\u2581\u2581", "<table>"])
    return fast


@pytest.mark.parametrize(
    "make", [lambda: bpe_tokenizer(TEXTS, 300), sentencepiece], ids=["byte-level", "sentencepiece"]
)
def test_the_bytes_of_tokens_join_to_the_text(make: Any) -> None:
    """Whatever the text spells, none of it is a special token; and of every single token decoding says the same, where
    it can say it at all."""
    tokenizer = make()
    found = token_bytes(tokenizer, "it")
    for text in TEXTS:
        ids = encode_plainly(tokenizer, text)
        assert b"".join(found.bytes_V[token] or b"?" for token in ids) == text.encode()
        assert not {*tokenizer.all_special_ids} & {*ids}
    for token, piece in enumerate(found.bytes_V):
        if token not in found.markup:
            assert piece.decode(errors="replace") == tokenizer.backend_tokenizer.decode([token])
    assert all(found.bytes_V[token] is None for token in tokenizer.all_special_ids)


def test_white_space_that_was_added_by_name_is_text_and_tags_are_not() -> None:
    tokenizer = sentencepiece()
    found, vocab = token_bytes(tokenizer, "it"), tokenizer.get_vocab()
    assert found.bytes_V[vocab["\u2581\u2581"]] == b"  " and vocab["\u2581\u2581"] not in found.markup
    assert found.bytes_V[vocab["<table>"]] == b"<table>" and vocab["<table>"] in found.markup
    assert found.id_of[b"\n"] == vocab["\n"] != vocab["<0x0A>"]  # of two tokens of one byte, what encoding writes


@pytest.mark.parametrize("swaps", [False, True])
def test_a_small_alphabet_is_proven_by_its_own_text(swaps: bool) -> None:
    """None of the usual texts can be written with two letters. One whose normaliser writes b for a is seen all the
    same, and one that can write nothing is not trusted."""
    alphabet = char_tokenizer("ab")
    if swaps:
        alphabet.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
        with pytest.raises(UserError, match="comes back as"):
            token_bytes(alphabet, "it")
        alphabet.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "?")
        with pytest.raises(UserError, match="none of the texts that would prove them"):
            token_bytes(alphabet, "it")
    else:
        assert {b"a", b"b"} <= {*token_bytes(alphabet, "it").id_of}


def test_tokenizers_whose_bytes_are_not_known_are_refused() -> None:
    pieces_of_words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces_of_words.decoder = decoders.WordPiece()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # without a decoder, joined by spaces
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    lower = bpe_tokenizer(TEXTS, 300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer, why in ((pieces_of_words, "WordPiece"), (words, "decoder"), (lower.backend_tokenizer, "comes back")):
        with pytest.raises(UserError, match=rf"(?s)those of models/x cannot be known exactly: .*{why}.*"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "models/x")
    with pytest.raises(UserError, match="no fast tokenizer"):
        token_bytes(object(), "models/x")
