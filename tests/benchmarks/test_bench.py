"""The benchmark beside peers: what it keeps, shows and refuses. Nothing is measured here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        from peers import cases, compare, page, parts
    finally:
        sys.path.remove(str(FOLDER))
    return {"cases": cases, "compare": compare, "page": page, "parts": parts}


def line(case: str, side: str, cpu_s: float, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = {f"{key}{end}": cpu_s for key in ("cpu_s", "wall_s") for end in ("", "_low", "_high")}
    told |= {"group": "loss", "sizes": {}, "runs": 5, "load": 1.0, "commit": "c"}
    return {"case": case, "side": side, **told, **more}


ABOUT = {"machine": "m", "versions": {"torch": "2"}, "commit": "c", "quick": False}


def test_cases_have_names_of_their_own_and_opdkit(peers: Any) -> None:
    """Both lists; opdkit is the first side of each, and the quick list has every group that the full one has."""
    full, quick = peers["cases"].cases(quick=False), peers["cases"].cases(quick=True)
    for cases in (full, quick):
        assert len({case.name for case in cases}) == len(cases)
        assert {case.sides[0] for case in cases} == {"opdkit"}
    assert {case.group for case in quick} == {case.group for case in full} == set(peers["page"].TITLES)


def test_a_ratio_that_rises_fails(peers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the last committed results: 0.50 -> 0.54 passes, 0.50 -> 0.56 does not, nor does a figure that is gone.
    A case measured anew takes the place of its own lines only."""
    compare = peers["compare"]
    path = tmp_path / "bench.jsonl"

    def git(*asked: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *who, *asked], cwd=tmp_path, check=True, capture_output=True)

    def measured(own: float, case: str = "loss a") -> list[dict[str, Any]]:
        return [
            line(case, "opdkit", own),
            line(case, "trl", 1.0),
            line(case, "liger", 0.0, failed="no") | {"cpu_s": 2.0},
        ]

    git("init", "-q")
    compare.write_results(path, ABOUT, measured(0.50))
    compare.write_results(path, ABOUT, measured(0.50, "loss b"))
    assert compare.compare(tmp_path) == 0 and "nothing committed" in capsys.readouterr().out
    git("add", ".")
    git("commit", "-qm", "first")
    compare.write_results(path, ABOUT, measured(0.54))
    assert compare.compare(tmp_path) == 0
    compare.write_results(path, ABOUT, measured(0.56))
    said = compare.compare(tmp_path)
    assert isinstance(said, str) and "loss a, to trl: 0.50 -> 0.56" in said and "loss b" not in said
    git("commit", "-qam", "worse")
    assert "0.50 -> 0.56" in str(compare.compare(tmp_path)), "committing a worse result does not hide it"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines if one.get("case") != "loss b"))
    assert "loss b, to trl: no longer measured" in str(compare.compare(tmp_path))


def test_the_page_says_what_did_not_run_and_what_was_missed(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 1.3 of the products misses 1.2; a peer that failed keeps its line and its reason."""
    page = tmp_path / "page.md"
    monkeypatch.setattr(peers["page"], "PAGE", page)
    case = "loss jsd bfloat16 V=9 H=256 N=9"
    parts = {"head": 0.8, "body": 0.0, "attention": 0.0, "exponentials": 0.125, "other": 0.25}
    failed = {"load": 2.0, "commit": "d", "failed": "ImportError: no | liger"}
    lines = [
        line(case, "opdkit", 1.3, peak_mib=10.0, error=1e-3, parts=parts, system_s=0.25),
        line(case, "products", 1.0, peak_mib=0.0),
        line(case, "trl", 2.6, peak_mib=40.0, error=2e-3),
        {"case": case, "group": "loss", "side": "liger", "sizes": {}, **failed},
    ]
    peers["compare"].write_results(tmp_path / "bench.jsonl", ABOUT, lines)
    peers["page"].write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "did not run: ImportError: no / liger" in text and "load 1 to 2" in text
    assert "opdkit at c, d." in text
    assert f"| {case} | trl | 2.6 [2.6, 2.6] | 2.6 | 40 | 2.0e-03 | 0.50 | 0.25 |" in text
    assert f"| loss / bare products, H = 256 | <= 1.2 | 1.3 ({case}) | missed, of 1 measured |" in text
    assert f"| bf16 gradient error against fp64 | <= 0.0025 | 0.001 ({case}) | met, of 1 measured |" in text
    assert "| step / TRL SDPO, V >= 32000 | <= 0.4 | not measured |  |" in text
    shown = "1.300 | 0.800 | 0.000 | 0.000 | 0.125 | 0.250 | 0.125 | 0.250 | 1.12 |"
    assert f"| {case} | {shown}" in text, "the rest is 0.125; products and exponentials 1.12 of the products"
    assert "**Quick run**: not run yet." in text
    assert "Not measured yet: loss forward_kl float32 V=32768 H=256 N=512; " in text


def test_operators_are_told_apart(peers: Any) -> None:
    """A product with the vocabulary of 48 is the head's, one without it the body's; each takes some time."""
    narrow, head = torch.ones(8, 8), torch.ones(8, 48)

    def run() -> None:
        (narrow @ head).softmax(-1)

    found = peers["parts"].parts(run, 48)
    assert found["head"] > 0 and found["exponentials"] > 0 and found["body"] == found["attention"] == 0
    assert peers["parts"].parts(lambda: narrow @ narrow, 48)["body"] > 0
