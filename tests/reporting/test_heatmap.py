"""The token heat-map: what each token is coloured by, what its note says, and which tokens stand out."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from hostile_run import byte_tokenizer, decode, make_rows

from opdkit.reporting.figures.heatmap import heat_map, legend, loss_parts, signal_scale, token_texts
from opdkit.types import Example, Signal


def tokens(html: str) -> list[tuple[str, str]]:
    """(classes, note) of every token's element."""
    found = re.findall(r'<i tabindex="-1" data-t="([^"]*)"(?: class="([^"]*)")?>', html)
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
    assert lines[0] == f"“s”  token 3 of {len(row.rollout.answer_ids)}"
    assert lines[1] == "student 50.0 % · teacher 75.0 %"
    assert lines[2].startswith("reverse_kl </pre><script>") and lines[2].endswith("2.25 · coefficient 0.125")
    assert lines[3] == f"{100 * 2.25 / 8 / whole:.1f} % of this answer's loss · clipped"
    first, second = (tokens(heat_map(row, 1.0, decode))[index][1] for index in (0, 1))
    assert "not written by the model: never counted" in first and "left out: coefficient 0" in second


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
    for words in ("likelier", "less likely", "clipped", "left out", "not written by the model"):
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
