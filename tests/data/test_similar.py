"""How alike questions are, by hand and against the definition; what goes from a file, and what stays byte for byte."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import jsonl, real

from opdkit.data.dedup import DedupOptions, dedup, write_report
from opdkit.data.similar import METHODS, Embeddings, Index, Method, same_numbers, shingles, tokens
from opdkit.errors import UserError


def test_tokens() -> None:
    """Spelling, case, layout and punctuation do not matter; numbers, signs and commands do."""
    one = tokens("Find $\\dfrac{1}{2}\\left(x + 1\\right)$, if $x \\le 3.5$.")
    assert one == ("find", "\\frac", "1", "2", "(", "x", "+", "1", ")", "if", "x", "\\leq", "3.5")
    assert tokens("find \\(\\tfrac 12 (x+1)\\)")[:3] == ("find", "\\frac", "12")
    assert tokens("x - 1") != tokens("x + 1") and tokens("\u201cPrime\u2019s\u201d") == tokens("prime s")


def test_similarity_by_hand() -> None:
    """Of a b c d e and a b c d x, 2 of 4 shingles of three tokens are common; the first three stand in the longer."""
    index = Index(["a b c d e"], method="ngram", threshold=0.5, n=3)
    match = index.nearest("A b, c d x")
    assert match is not None and (match.place, match.similarity) == (0, 0.5)
    assert Index(["a b c d e"], method="ngram", threshold=0.51, n=3).nearest("a b c d x") is None
    inside = Index(["a b c d"], method="containment", threshold=1.0, n=3).nearest("w v u a b c d e f g h")
    assert inside is not None and inside.similarity == 1.0
    assert Index(["a b c d"], method="ngram", threshold=0.5, n=3).nearest("w v u a b c d e f g h") is None
    assert same_numbers("3 of 4", "4 and 3") and not same_numbers("3 of 4", "3 of 5")


@pytest.mark.parametrize("method", ["ngram", "containment"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.75, 1.0])
def test_index_equals_the_definition(method: Method, threshold: float) -> None:
    """Looking up only the rarest shingles misses no pair: the same as comparing everything with everything."""
    draw = random.Random(0)
    words = [" ".join(draw.choices("abcd", k=draw.randint(1, 12))) for _ in range(150)]
    index = Index(words[:100], method=method, threshold=threshold, n=2)
    for question in words[50:]:
        own = shingles(question, 2)
        every = []
        for place, other in enumerate(words[:100]):
            theirs = shingles(other, 2)
            common = len(own & theirs)
            every.append((common / len(theirs if method == "containment" else own | theirs), -place))
        best = max(every)
        match = index.nearest(question)
        found = None if match is None else (match.similarity, -match.place)
        assert found == (best if best[0] >= threshold else None)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "embedding"])
def test_dedup_by_method(method: Method, tmp_path: Path) -> None:
    """What each method finds of a copy, a respelled copy, a reworded copy and a copy inside a longer question, with
    different instructions around them."""
    base = "How many integers n with n greater than 3 divide the number 360 evenly"
    rows = [
        {"problem": base + " Please reason step by step, and put your final answer within \\boxed{}.", "answer": "1"},
        {"problem": f"  {base.upper()}? ", "answer": "1"},
        {"problem": base.replace("evenly", "without remainder"), "answer": "1"},
        {"problem": f"Alice and Bob are given a task by their teacher. {base}? Alice goes first.", "answer": "1"},
        {"problem": "Something else entirely.", "answer": "1"},
    ]
    source = jsonl(tmp_path / "train.jsonl", rows)
    test = jsonl(tmp_path / "test.jsonl", [{"prompt": [{"role": "user", "content": base}], "answer": "1"}])
    found = dedup(source, [test], out=None, options=DedupOptions(method=method, threshold=0.7))
    lines = sorted(int(pair.where.rpartition(":")[2]) for pair in found.against[0].pairs)
    assert lines == {"exact": [1], "normalised": [1, 2], "ngram": [1, 2, 3], "containment": [1, 2, 3, 4]}[method]


def test_embeddings(tmp_path: Path) -> None:
    """By cosine, the most alike first; every text is read once, however many sets it is compared with."""
    vectors = {"one": [1.0, 0.0], "uno": [0.96, 0.28], "eins": [0.8, 0.6], "two": [0.0, 1.0]}
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return np.array([vectors[text] for text in texts], dtype=np.float32)

    source = jsonl(tmp_path / "a.jsonl", [{"problem": text, "answer": "1"} for text in ("two", "uno", "eins")])
    others = [jsonl(tmp_path / f"{name}.jsonl", [{"problem": "one", "answer": "1"}]) for name in "bc"]
    options = DedupOptions(method="embedding", threshold=0.9)
    found = dedup(source, others, out=tmp_path / "rest.jsonl", options=options, embed=embed)
    assert [[(pair.question, round(pair.similarity, 2)) for pair in b.pairs] for b in found.against] == [
        [("uno", 0.96)], [("uno", 0.96)]
    ]  # fmt: skip
    assert sorted(asked) == ["eins", "one", "two", "uno"]
    assert [json.loads(line)["problem"] for line in (tmp_path / "rest.jsonl").read_text().splitlines()] == [
        "two",
        "eins",
    ]
    with pytest.raises(UserError, match="--method embedding needs --model"):
        dedup(source, others, out=None, options=options)


def test_a_models_vectors(tiny_folder: Path) -> None:
    """Mean of the last hidden states over a text's own tokens: padding moves no vector, and each has length 1."""
    from opdkit.engines.embed import embedder

    embed = embedder(str(tiny_folder))
    together = Embeddings(embed).of(["1+1", "abc de", "2"])
    alone = np.concatenate([embed([text]) for text in ("1+1", "abc de", "2")])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-6)
    with pytest.raises(UserError, match="there is no such folder"):
        embedder(str(tiny_folder / "none"))


def test_rows_that_stay_are_untouched(tmp_path: Path) -> None:
    """JSON lines byte for byte, blank lines and rows without a question too; a JSON list and Parquet value for value,
    with schema and metadata."""
    rows = [{"problem": f"Number {n} of these many questions?", "answer": str(n), "x": [n]} for n in range(6)]
    test = jsonl(tmp_path / "test.jsonl", rows[2:4])
    text = "\n".join([json.dumps(row, indent=None, separators=(" ,", ":  ")) for row in rows] + ["", '{"y": 1}', ""])
    (tmp_path / "a.jsonl").write_text(text)
    found = dedup(str(tmp_path / "a.jsonl"), [test], out=tmp_path / "b.jsonl", options=DedupOptions(method="exact"))
    assert (found.num_rows, found.num_removed, found.num_not_compared) == (7, 2, 1)
    lines = text.splitlines(keepends=True)
    assert (tmp_path / "b.jsonl").read_text() == "".join(lines[:2] + lines[4:])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dedup(str(tmp_path / "a.json"), [test], out=tmp_path / "b.json", options=DedupOptions(method="exact"))
    assert json.loads((tmp_path / "b.json").read_text()) == rows[:2] + rows[4:]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"who": "me"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    dedup(str(tmp_path / "a.parquet"), [test], out=tmp_path / "b.parquet", options=DedupOptions(method="exact"))
    rest = pq.read_table(tmp_path / "b.parquet")
    assert rest.to_pylist() == rows[:2] + rows[4:] and rest.schema.metadata == {b"who": b"me"}
    assert rest.schema.types == pq.read_schema(tmp_path / "a.parquet").types


def test_folder_of_evaluation_sets(tmp_path: Path) -> None:
    """One command against every set in a folder: each is reported, training files and the file itself are not read."""
    row = {"problem": "Is this question in more than one set?", "answer": "1"}
    source = jsonl(tmp_path / "sets" / "mine" / "test.jsonl", [row, {"problem": "Another one.", "answer": "2"}])
    for name in ("x/test.jsonl", "y/validation.jsonl", "y/train.jsonl"):
        jsonl(tmp_path / "sets" / name, [row])
    found = dedup(source, [str(tmp_path / "sets")], out=None)
    assert [Path(entry.source).name for entry in found.against] == ["test.jsonl", "validation.jsonl"]
    assert (found.num_removed, [len(entry.pairs) for entry in found.against]) == (1, [1, 1])
    write_report(found, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["against"][0]["pairs"][0]["similarity"] == 1.0


def test_real_contamination() -> None:
    """3 of the 6000 sampled DAPO-Math rows are in the sampled half of MATH-500: two to the letter but for LaTeX, one
    with another final question."""
    found = dedup(real("dapo_math") + "/train.parquet", [real("math500"), real("aime24")], out=None)
    assert [round(pair.similarity, 2) for pair in found.against[0].pairs] == [1.0, 1.0, 0.59]
    assert found.against[1].pairs == [] and found.num_removed == 3


def test_refusals(tmp_path: Path) -> None:
    """Each in a sentence, with nothing written."""
    source = jsonl(tmp_path / "train.jsonl", [{"problem": "One?", "answer": "1"}])
    no_questions = jsonl(tmp_path / "other.jsonl", [{"text": "x"}])
    out = tmp_path / "out.jsonl"
    cases = [
        (source, [source], {"out": out}, "every row of .* would go, so .* is not written"),
        (source, [no_questions], {"out": out}, "has no row with a question to compare; the first .*no question column"),
        (source, [], {"out": out}, "nothing to compare with: give --against"),
        (source, [str(tmp_path / "nix.jsonl")], {"out": out}, "no data at .*nix.jsonl"),
        (source, [source], {"out": tmp_path / "out.parquet"}, "should end in .jsonl"),
        (source, [source], {"out": Path(source)}, "exists already; name another --out, or give --overwrite"),
        (str(tmp_path), [source], {"out": out}, "nothing can be removed from"),
        (source, [source], {"out": out, "options": DedupOptions(threshold=0)}, "--threshold 0 must be above 0"),
        (source, [source], {"out": out, "options": DedupOptions(n=0)}, "--ngram 0 must be 1 or more"),
    ]
    for name, against, options, said in cases:
        with pytest.raises(UserError, match=said):
            dedup(name, against, **options)  # type: ignore[arg-type]
        assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "train.jsonl"]
