"""Numbers, marks and panels: coordinates one can check by hand."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hostile_run import DATASET, make_summary, result

from opdkit.errors import UserError
from opdkit.reporting.figures.curves import Point, main_panels, panel
from opdkit.reporting.html.markup import Html, escape, tag
from opdkit.reporting.html.numbers import compact, duration, share, ticks
from opdkit.reporting.run import headline_of
from opdkit.reporting.sections.headline import headline_figure


def test_markup_escapes_every_plain_string() -> None:
    assert tag("p", "1 < 2", tag("b", "&"), class_='a"b', x=None) == '<p class="a&quot;b">1 &lt; 2<b>&amp;</b></p>'
    assert isinstance(tag("p"), Html) and not isinstance(tag("p") + "<", Html)
    assert escape("a\x00\x1b\x7f\n\ud800\u202eb") == "a\u2400\u241b\u2421\n\ufffd[U+202E]b"
    escape("\ud800").encode("utf-8")


def test_what_cannot_be_seen_is_named_and_scripts_that_need_joiners_keep_them() -> None:
    """Bidi controls, zero-width characters and blanks that pass for letters; an emoji and a Persian word stay whole."""
    for code in (0x200E, 0x200F, 0x061C, 0x202E, 0x2066, 0x200B, 0x2060, 0xFEFF, 0x00AD, 0x3164, 0x2028, 0xE0041):
        assert escape(f"a{chr(code)}b") == f"a[U+{code:04X}]b"
    assert escape("a\u200db x\ufe0f") == "a[U+200D]b x[U+FE0F]"
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    for text in ("👩\u200d👧 ❤\ufe0f\u200d🔥 1\ufe0f\u20e3", persian, "é ü 日本"):
        assert escape(text) == text
    assert escape("👩\u200d\u200dx") == "👩[U+200D][U+200D]x"


def test_numbers_by_hand() -> None:
    shown = {0.0: "0", 12.0: "12", 12345.0: "12,345", 0.5: "0.5", 0.12345: "0.1235", 1234.56: "1,235", 0.0004: "4e-4"}
    assert {value: compact(value) for value in shown} == shown
    assert compact(None) == "-" and compact(-0.00123456) == "-0.001235"
    assert (duration(7.24), duration(61), duration(600), duration(7260)) == ("7.2 s", "61 s", "10 min", "2 h 01 min")
    assert (share(12, 480), share(1, 1920), share(3, 3)) == (
        "12 of 480 (2.5 %)", "1 of 1,920 (< 0.1 %)", "3 of 3 (100 %)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.05, [0, 0.02, 0.04, 0.06]),
        (3, 3, [0, 2, 4, 6]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def texts(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_figure_is_a_whole_svg_with_real_text_and_true_positions(tmp_path: Path) -> None:
    """Parsed as XML: every label and number is text; dots and whiskers stand at their values on a 0 to 1 axis."""
    headline_figure(make_summary(), tmp_path / "figure.svg")
    root = ET.parse(tmp_path / "figure.svg").getroot()
    said = texts(root)
    for text in ("Student before", "Student after opd", "Teacher", "0.836", "[0.818, 0.853]", DATASET):
        assert text in said
    assert any(text.startswith("SFT </pre><script>") for text in said)
    svg = (tmp_path / "figure.svg").read_text()
    assert re.search(r'class="whisker" x1="81.80%" x2="85.30%"', svg)
    assert re.search(r'<svg x="83.60%" y="50%"><circle', svg)
    assert "prefers-color-scheme:dark" in svg and "<script" not in svg


def test_figure_of_small_and_negative_rewards_fits_its_axis(tmp_path: Path) -> None:
    """No mark leaves the drawing, whatever the rewards."""
    summary = make_summary(arms={})
    for values in ((-0.5, -0.6, -0.4), (0.01, 0.0, 0.03), (0.0, 0.0, 0.0), (7.0, 6.5, 7.5), (0.4, None, None)):
        summary["eval"] = {f"student_{when}": {DATASET: result(*values)} for when in ("before", "after")}
        summary["eval"]["teacher"] = None
        headline_figure(summary, tmp_path / "figure.svg")
        at = [float(x) for x in re.findall(r'"(-?[\d.]+)%"', (tmp_path / "figure.svg").read_text())]
        assert at and all(0 <= x <= 100 for x in at)


def test_figure_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name it figure\.svg"):
        headline_figure(make_summary(), tmp_path / "figure.png")
    with pytest.raises(UserError, match="not of the form"):
        headline_figure({"name": "x"}, tmp_path / "figure.svg")
    empty = make_summary(arms={}, eval={"student_before": {}, "student_after": {}, "teacher": None})
    with pytest.raises(UserError, match="holds no evaluation"):
        headline_figure(empty, tmp_path / "figure.svg")
    assert list(tmp_path.iterdir()) == []


def test_headline_order_and_arms_without_a_teacher() -> None:
    entries = headline_of(make_summary())[DATASET]
    assert [entry.kind for entry in entries] == ["before", "after", "arm", "teacher"]
    summary = make_summary()
    summary["eval"]["teacher"] = None
    assert [entry.kind for entry in headline_of(summary)[DATASET]] == ["before", "after", "arm"]


def test_unknown_values_are_gaps_not_zeros() -> None:
    """1, 2, unknown, 3: one line of two points and one lone dot; the axis does not reach down to 0 for the gap."""
    html = panel("x", [Point(1, 10.0), Point(2, 11.0), None, Point(4, 12.0)])
    assert re.findall(r'points="([^"]*)"', html) == ["0,112.0 333,60.0"]
    assert html.count("<circle") == 1 and 'cx="100.00%"' in html


def test_share_of_truncated_answers_by_hand() -> None:
    lines = [{"step": 1, "rollout/num_rows": 8, "rollout/num_truncated": 2}, {"step": 2, "rollout/num_rows": 8}]
    (figure,) = main_panels(lines)
    assert "Share cut at the limit" in figure and "0.25" in figure


def test_long_curves_are_means_and_say_so() -> None:
    """10,000 steps become at most 400 points; one wild value moves its own bin only."""
    curve = [Point(step, 1000.0 if step == 5000 else 1.0) for step in range(10_000)]
    html = panel("x", curve)
    raw = re.search(r'class="raw" points="([^"]*)"', html)
    assert raw and len(raw[1].split()) == 400
    assert "Each point is the mean of 25 steps." in html and len(html) < 30_000


def test_strings_and_infinities_in_metrics_are_unknown() -> None:
    assert main_panels([{"step": 1, "train/loss": "nan"}, {"step": 2, "train/loss": float("inf")}]) == []
