"""Diversity of the answers to one problem: published numbers, by hand, invariances, hostile programs."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from opdkit.measure.diversity import (
    NGrams,
    distinct_words,
    text_distance,
    tokens,
    tree_distance,
    unique_ratio,
)
from opdkit.measure.programs import handle, node_counts
from opdkit.tasks.code.text import extract_program

CASES = json.loads((Path(__file__).parents[1] / "parity" / "metrics.json").read_text())["cases"]
DIVERSITY = {case["id"]: case for case in CASES if case["id"].startswith("pub.metrics.diversity")}


@pytest.mark.parametrize("name", DIVERSITY)
def test_published_numbers(name: str) -> None:
    """Tokens and every measure of the vectors, to 1e-12; programs are those our own extraction finds."""
    case = DIVERSITY[name]
    texts, expected = case["inputs"]["texts"], case["outputs"]
    views = [extract_program(text) or text for text in texts] if case["config"]["task"] == "code" else texts
    assert views == expected.get("views", texts)
    grams, everyone = NGrams([tokens(view) for view in views]), range(len(views))
    found = {
        "tokens": [tokens(view) for view in views],
        "self_bleu4": grams.self_bleu(everyone),
        "distinct1": grams.distinct(1, everyone),
        "distinct2": grams.distinct(2, everyone),
        "unique_ratio": unique_ratio(views),
        "pairwise_text_distance": text_distance(views),
        "distinct4_whitespace_within_texts": distinct_words(texts),
    }
    if "ast_node_jaccard_distance" in expected:
        found["ast_node_jaccard_distance"] = tree_distance([c for view in views if (c := handle(view))])
    assert found.pop("tokens") == expected["tokens"]
    for key, value in found.items():
        close = None if expected[key] is None else pytest.approx(expected[key], abs=1e-12, rel=1e-12)
        assert value == close, key


def test_ngram_distance_by_hand() -> None:
    """ "a b" and "a c": 1-grams a b / a c, 2-grams ab / ac: one of five different n-grams is shared."""
    grams = NGrams([["a", "b"], ["a", "c"], [], []])
    assert grams.distance([0, 1]) == pytest.approx(4 / 5)
    assert grams.distance([0, 0]) == 0.0 and grams.distance([2, 3]) == 0.0 and grams.distance([0, 2]) == 1.0
    assert grams.distance([0]) is None and grams.self_bleu([0]) is None and grams.distinct(1, [2]) is None


def test_a_subset_is_as_if_the_others_were_not_there() -> None:
    """Success-only measures use the n-grams of all texts: the same as counting anew."""
    rng = random.Random(0)
    texts = [[rng.choice("abcd") for _ in range(rng.randrange(12))] for _ in range(7)]
    grams = NGrams(texts)
    for chosen in itertools.combinations(range(7), 3):
        alone = NGrams([texts[i] for i in chosen])
        for n in (1, 2, 4):
            assert grams.distinct(n, chosen) == alone.distinct(n, range(3))
        assert grams.self_bleu(chosen) == pytest.approx(alone.self_bleu(range(3)))
        assert grams.distance(chosen) == pytest.approx(alone.distance(range(3)))


def test_the_order_of_the_texts_does_not_matter() -> None:
    """But for distinct_n, whose published n-grams run across neighbouring texts."""
    texts = [tokens(text) for text in ("x = 1", "x = 2 + 3", "for i in x: pass", "x = 1")]
    first, second = NGrams(texts), NGrams(texts[::-1])
    assert first.self_bleu(range(4)) == pytest.approx(second.self_bleu(range(4)))
    assert first.distance(range(4)) == pytest.approx(second.distance(range(4)))


def test_hostile_programs_cost_nothing() -> None:
    """Nesting, null bytes, size and endless digits: no tree, no exception, and the program beside them is counted."""
    hostile = [
        "(" * 50_000,
        "-" * 90_000 + "1",
        "a" + ".b" * 40_000,
        "\x00",
        "x" * 200_000,
        "if True print(1)",
        "9" * 50_000,
    ]
    found = node_counts([*hostile, "x = 1", "x = 1"])
    assert found["x = 1"] == {"Module": 1, "Assign": 1, "Name": 1, "Store": 1, "Constant": 1}
    assert found["if True print(1)"] is None and found["\x00"] is None and found["x" * 200_000] is None
    assert len(found) == len(hostile) + 1
