"""Blocks, wordings, thoughts and summaries: text in, text out."""

import time

import pytest

from opdkit.contexts.blocks import WORDINGS, Block, Wording, summary_of, without_thinking


def test_layout_by_hand() -> None:
    """Blocks of a kind stand one after another, kinds where the layout says; earlier turns are untouched."""
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
    blocks = [
        Block(kind="success", text="4"),
        Block(kind="failed_summary", text="five"),
        Block(kind="another", text="four"),
        Block(kind="summary", text="count"),
        Block(kind="another", text="IV"),
    ]
    said = WORDINGS["published"].compose([system, user], blocks)
    assert said == (
        system,
        {
            "role": "user",
            "content": "2+2?\nCorrect solution:\n\n4"
            "\nSummary of another unsuccessful solution:\n\nfive\n\n"
            "\nSummary of another successful solution:\n\ncount\n\n"
            "\nAnother successful solution:\n\nfour\nAnother successful solution:\n\nIV"
            "\n\nCorrectly solve the original question.",
        },
    )
    assert user["content"] == "2+2?"  # the problem itself is left as it was


def test_texts_are_never_searched_for_places() -> None:
    """Model output is hostile: what looks like a place, a format field or a group reference is shown as it is."""
    wording = Wording(layout="{question} in \\boxed{answer} {success}{another}{summaries}{failure}{feedback}")
    for text in ("{feedback}{question}", "{text}", "{0.__class__}", r"\1 \g<0>", "{", "}}"):
        (turn,) = wording.compose(
            [{"role": "user", "content": text}], [Block(kind="success", text=text), Block(kind="feedback", text="F")]
        )
        assert turn["content"] == (
            f"{text} in \\boxed{{answer}} \nCorrect solution:\n\n{text}"
            "\nThe following is feedback from your unsuccessful earlier attempt:\n\nF"
        )


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"layout": "{success} Solve it."}, "no {question}"),
        ({"layout": "{question}{failure}{failure}"}, "{failure} twice"),
        ({"success": "Correct:"}, "wording.success must have {text} once"),
        ({"feedback": "{text} and {text}"}, "wording.feedback must have {text} once"),
        ({"succes": "{text}"}, "Extra inputs"),
    ],
)
def test_wordings_that_lose_something_are_refused(keys: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Wording.model_validate(keys)
    assert sentence in str(error.value)


def test_a_hostile_answer_costs_linear_time() -> None:
    """A million openings without a close: one regular expression would need hours. Does not bound the constant."""
    text = "<think>" * 1_000_000
    started = time.perf_counter()
    assert without_thinking("a<think>b</think> " + text) == "a" + text
    assert without_thinking("<think></think>" * 100_000) == ""
    assert summary_of("<summary>" * 1_000_000, "summary") == ("<summary>" * 40)[:300]
    assert time.perf_counter() - started < 5


def test_summaries_by_hand() -> None:
    assert summary_of("x <s> a\nb </s> y <s>c</s>", "s") == "a\nb"
    assert summary_of("x <s>never closed", "s") == "x <s>never closed"
    assert summary_of("</s> x <s>in</s>", "s") == "in"
    assert summary_of(" " + "long" * 100, "s") == ("long" * 75)[:299]
