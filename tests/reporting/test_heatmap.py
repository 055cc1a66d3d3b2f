"""The token heat-map: what each token is coloured by, what its note says, and which tokens stand out."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from hostile_run import byte_tokenizer, decode, make_rows

from opdkit.reporting.figures.heatmap import heat_map, legend, signal_scale
from opdkit.reporting.figures.tokens import loss_parts, token_texts
from opdkit.types import Example, Signal, TurnRecord


def tokens(html: str) -> list[tuple[str, str]]:
    """(classes, note) of every token's element."""
    found = re.findall(r'<i(?: tabindex="0")? data-t="([^"]*)"(?: class="([^"]*)")?>', html)
    return [(classes, unescape(note)) for note, classes in found]


@pytest.fixture
def row() -> Example:
    return make_rows()[0]


def test_every_tokens_part_by_hand(row: Example) -> None:
    """Coefficient 1/8 times loss 0.25 + place % 5; tokens with coefficient 0 have no part, whatever their loss."""
    parts_T = loss_parts(row)
    assert parts_T is not None
    np.testing.assert_allclose(parts_T[:6], [0, 0, 2.25 / 8, 3.25 / 8, 4.25 / 8, 0.25 / 8])
    assert signal_scale([row]) == pytest.approx(4.25 / 8) and loss_parts(replace(row, taught=None)) is None


def test_colours_and_kinds(row: Example) -> None:
    """Blue where the teacher likes the token more, orange where less; as deep as the part; kinds are visible."""
    marked = tokens(heat_map(row, 4.25 / 8, decode))
    assert [classes for classes, _ in marked[:6]] == ["m", "o", "u4 x", "d5", "u6", "d1"]
    assert len(marked) == len(row.rollout.answer_ids)


def test_the_note_of_a_token(row: Example) -> None:
    """What was said of it, in the order a reader asks: which token, who thought what, what it did to the loss."""
    _, note = tokens(heat_map(row, 1.0, decode))[2]
    whole = sum(abs(part) for part in loss_parts(row))  # type: ignore[union-attr]
    lines = note.splitlines()
    assert lines[0] == f"“s” token 3 of {len(row.rollout.answer_ids)}"
    assert lines[1] == "student 50.0 % · teacher 75.0 %"
    assert lines[2].startswith("reverse_kl </pre><script>") and lines[2].endswith("2.25 · coefficient 0.125")
    assert lines[3] == f"{100 * 2.25 / 8 / whole:.1f} % of this answer's loss · clipped"
    first, second = (tokens(heat_map(row, 1.0, decode))[index][1] for index in (0, 1))
    assert "written by the environment: not learned from" in first and "left out: coefficient 0" in second


def test_the_teachers_own_words_where_it_gave_a_list(row: Example) -> None:
    num_tokens = len(row.rollout.answer_ids)
    signal = Signal(
        sampled_logprob_T=np.full(num_tokens, -1.0, dtype=np.float32),
        topk_ids_TK=np.tile([65, 66], (num_tokens, 1)),
        topk_logprob_TK=np.log(np.tile([0.25, 0.5], (num_tokens, 1))).astype(np.float32),
    )
    _, note = tokens(heat_map(replace(row, signals={"teacher": signal}), 1.0, decode))[3]
    assert "teacher's first: “B” 50.0 %, “A” 25.0 %" in note
    assert signal.topk_logprob_TK is not None
    signal.topk_logprob_TK[3] = np.nan  # a teacher with another tokenizer has no word on it
    _, note = tokens(heat_map(replace(row, signals={"teacher": signal}), 1.0, decode))[3]
    assert "teacher's first" not in note


def test_rows_without_what_was_taught(row: Example) -> None:
    """No colour is made up: rows of an older opdkit, and rows that left the batch."""
    bare = replace(row, taught=None, signals={})
    assert {classes for classes, _ in tokens(heat_map(bare, 0.0, decode))} == {"m", ""}
    assert "the loss did not read this answer" in tokens(heat_map(bare, 0.0, decode))[3][1]
    assert "Tokens have no colours" in legend([bare])


def test_without_a_teacher_there_is_no_direction(row: Example) -> None:
    assert tokens(heat_map(replace(row, signals={}), 4.25 / 8, decode))[4][0] == "n6"
    assert "likelier" not in legend([replace(row, signals={})])


def test_the_legend_names_what_occurs(row: Example) -> None:
    said = legend([row])
    for words in ("likelier", "less likely", "clipped", "left out", "not learned from"):
        assert words in said
    assert row.taught
    unclipped = replace(row, taught=replace(row.taught, clipped_T=np.zeros_like(row.taught.clipped_T)))
    assert "clipped" not in legend([unclipped])


def test_texts_of_tokens_add_up_and_characters_stay_whole() -> None:
    """A byte-level tokenizer splits é and a smile over several tokens: only the last of each shows it."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a é\n😀b").ids
    texts = token_texts(ids, tokenizer.decode)
    assert "".join(texts) == "a é\n😀b" and "é" in texts and "😀" in texts and "" in texts
    assert "\ufffd" not in "".join(texts) and len(texts) == len(ids)
    assert token_texts(ids[:-2], tokenizer.decode)[-1].endswith("\ufffd")  # cut inside the smile: said, not dropped
    assert token_texts([5, 6], None) == ["5 ", "6 "] and token_texts([], tokenizer.decode) == []


def test_long_answers_are_coloured_in_part(row: Example) -> None:
    """The rest of the text is there, as text."""
    from opdkit.reporting.figures import heatmap

    assert row.taught
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heatmap, "NUM_COLOURED", 4)
        html = heat_map(row, 1.0, decode)
    assert len(tokens(html)) == 4 and "er 0 &lt;/pre&gt;" in html


def long_row(row: Example, text: str) -> Example:
    """An answer of this text, a token a character, of which every token was taught a loss of 1."""
    num = len(text)
    assert row.taught and row.signal
    ones = np.ones((1, num), dtype=np.float32)
    taught = replace(row.taught, coef_ST=ones, loss_ST=ones, clipped_T=np.zeros(num, bool),
                     student_logprob_T=-ones[0], student_entropy_T=ones[0])  # fmt: skip
    rollout = replace(row.rollout, answer_ids=tuple(map(ord, text)), answer_mask=np.ones(num, bool))
    return replace(row, rollout=rollout, taught=taught, signals={"teacher": Signal(sampled_logprob_T=-ones[0] / 2)})


def test_a_long_answer_is_shown_by_sentence_below_a_map(row: Example) -> None:
    """100 sentences of 12 characters: a row and a bar for each, that leads there, with 1 % of the loss; the tokens are
    inside, and nothing of the text is lost."""
    text = ("Twelve of x. " * 100).rstrip()
    html = heat_map(long_row(row, text), 1.0, decode, "g7a2")
    names = re.findall(r'<details id="(g7a2s\d+)">', html)
    assert len(names) == len(set(names)) == 100 and re.findall(r'href="#(g7a2s\d+)"', html) == names
    assert html.count("<b>1.0 %</b>") == 99 and html.count('<rect x="') == 200 and html.count("<i ") == len(text)
    assert "<title>tokens 1 to 12: 0.9 % of the loss</title>" in html
    assert html.count('<i tabindex="0"') == 100, "the first token of each sentence is a stop of the tab key"
    whole = "".join(unescape(each) for each in re.findall(r"<i [^>]*>([^<]*)</i>", html))
    assert whole == text
    assert "<details" not in heat_map(long_row(row, text[:399]), 1.0, decode)


def test_sentences_are_neither_tiny_nor_endless(row: Example) -> None:
    """ "1. 2. 3. ..." is joined to sentences of at least 8 tokens; a text without an end is cut after 80."""
    for text, count in (("1. " * 200, 67), ("x" * 800, 10)):
        lengths = [int(b.replace(",", "")) - int(a.replace(",", "")) + 1 for a, b in
                   re.findall(r"tokens ([\d,]+) to ([\d,]+)", heat_map(long_row(row, text), 1.0, decode))]  # fmt: skip
        assert len(lengths) == count and sum(lengths) == len(text) and min(lengths[:-1]) >= 8 and max(lengths) <= 80


def test_an_episode_is_shown_turn_by_turn(row: Example) -> None:
    """Model, environment, model: each with who wrote it, what was not learned from, and what became of the turn."""
    text = "call it 42 so it is 42"
    long = long_row(row, text)
    turn = np.array([0] * 11 + [1] * 11, dtype=np.int16)
    author = np.array([0] * 8 + [3] * 3 + [0] * 11, dtype=np.uint8)
    mask = (author == 0) & (np.arange(22) != 21)
    records = (
        TurnRecord(finish="stop", num_calls=1, failure="tool_error", cut_tokens=7),
        TurnRecord(finish="stop", reward=0.5),
    )
    rollout = replace(long.rollout, turn=turn, author=author, answer_mask=mask, turns=records, ended="done")
    html = heat_map(replace(long, rollout=rollout), 1.0, decode)
    assert re.findall(r'<div class="turn (t\d)"><p class="role">([^<]*)</p>', html) == [
        ("t0", "turn 1 · the student, 8 tokens · 1 call · tool error"),
        ("t3", "turn 1 · the environment, 3 tokens · not learned from · 7 cut out of its middle"),
        ("t0", "turn 2 · the student, 11 tokens · 1 of them not learned from · reward 0.5"),
    ]
    assert "".join(re.findall(r"<i [^>]*>([^<]*)</i>", html)) == text
    later = replace(rollout, turn=turn + np.int16(1), episode=0)  # a row that begins with the second turn
    assert "turn 2 · the student, 8 tokens · 1 call · tool error" in heat_map(replace(long, rollout=later), 1.0, decode)
