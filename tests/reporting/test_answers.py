"""The groups of answers: who stands beside whom, what is said once, what can be searched, what a page leaves out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile_run import EVIL, decode, make_rows
from test_page import Page

from opdkit.reporting.html.markup import escape
from opdkit.reporting.run import RunContents
from opdkit.reporting.sections import answers as module
from opdkit.reporting.sections.answers import answers
from opdkit.types import Example, View


def run_of(rows: list[Example]) -> RunContents:
    return RunContents(
        folder=Path("run"), name="run", recipe_text=None, recipe={}, environment=None, metrics=[],
        went_back=(), summary=None, headline={}, history={}, rows_step=3, rows=rows, missing=[],
    )  # fmt: skip


def shown(rows: list[Example]) -> str:
    html = answers(run_of(rows), decode)
    Page(html)  # closes what it opens
    return html


def articles(html: str) -> list[str]:
    return re.findall(r"<article.*?</article>", html, re.DOTALL)


def test_all_answers_to_a_problem_stand_beside_each_other() -> None:
    """Three groups of two; each answer links to the peer that its teacher was shown, which is beside it."""
    html = shown(make_rows())
    groups = html.split('class="group"')[1:]
    assert len(groups) == 3 and all(len(articles(group)) == 2 for group in groups)
    for place, group in enumerate(groups):
        first, second = articles(group)
        assert f'id="g{place}a0"' in first and f'href="#g{place}a1">answer 1</a>' in first
        assert f'id="g{place}a1"' in second and f'href="#g{place}a0">answer 0</a>' in second
        assert "✓ reward" in first and "✗ reward" in second and "✓✗ mean 0.500" in group
    assert html.count(' open="open"') == 1, "only the first is open"


def test_a_reading_that_all_answers_share_is_shown_once_and_others_beside_each_answer() -> None:
    """The context of the hostile run is the same for both answers; another view read something else each time, and what
    it read beyond the student's prompt is set off."""
    rows = [row for row in make_rows() if row.problem.id.startswith("problem 1")]
    prompt = tuple(map(ord, "ask: ?"))
    rows = [
        replace(
            row,
            rollout=replace(row.rollout, prompt_ids=prompt),
            views={**row.views, "wrong": View(context_ids=tuple(map(ord, f"ask: hint {index} ?")))},
        )
        for index, row in enumerate(rows)
    ]
    html = shown(rows)
    assert html.count("What the teacher read before every answer") == 1
    assert html.count("What view wrong read before it (13 tokens, the student 6)") == 2
    for index, article in enumerate(articles(html)):
        assert (
            f'<span class="quiet">ask: </span><span class="own">hint {index} </span><span class="quiet">?</span>'
            in article
        )


def test_a_peer_that_is_not_beside_it_is_shown_in_full() -> None:
    """Of another problem (as a control reads), and one that was not saved."""
    rows = make_rows()
    view = replace(rows[0].views["teacher"], sources=((rows[1].problem.id, 0), ("gone", 7)))
    html = shown([replace(rows[0], views={"teacher": view}), *rows[1:]])
    assert escape(f"shown: answer 0 to problem problem 1 {EVIL}, reward 1") in html
    assert "shown: answer 7, which was not saved" in html


def test_what_can_be_searched_by_stands_at_the_answer_and_in_the_choice() -> None:
    """Outcome, cut answers, answers the loss did not read; a kind that nobody has is no choice."""
    rows = make_rows()
    rows[4] = replace(rows[4], taught=None)
    rows[3] = replace(rows[3], rollout=replace(rows[3].rollout, reward=None))
    html = shown(rows)
    kinds = sorted(re.findall(r'data-f="([^"]*)"', html))
    assert kinds == sorted(["right peers"] * 3 + ["ungraded peers", "wrong untaught peers", "wrong cut peers"])
    for said in ("reward 1 or more (3)", "not graded (1)", "cut at the length limit (1)", "taught nothing (1)"):
        assert said in html
    assert "reward between" not in html and "several turns" not in html and "shown peers (" not in html


def test_the_page_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two problems of three, and notes for the tokens of one answer and a bit: the rest is text, and counted."""
    monkeypatch.setattr(module, "NUM_GROUPS", 2)
    monkeypatch.setattr(module, "NUM_COLOURED", len(make_rows()[0].rollout.answer_ids) + 5)
    html = shown(make_rows())
    assert len(articles(html)) == 4
    assert "Of the problems 2 are on this page" in html and "2 answers further down are plain text" in html
    assert len(re.findall(r"<i[^>]* data-t=", html)) == len(make_rows()[0].rollout.answer_ids) + 5


def test_best_and_worst_come_in_turn() -> None:
    rows = [
        replace(row, problem=replace(row.problem, id=str(index)), views={},
                rollout=replace(row.rollout, problem_id=str(index), reward=reward))
        for index, (row, reward) in enumerate(zip(make_rows(), [0.0, 0.25, None, 1.0, 0.5, 0.75], strict=True))
    ]  # fmt: skip
    means = [float(each) for each in re.findall(r'data-r="([^"]*)"', shown(rows))]
    assert means == [1.0, 0.0, 0.75, 0.25, 0.5, -1.0]


def test_no_loss_that_is_no_number_breaks_the_page() -> None:
    row = make_rows()[0]
    assert row.taught
    broken = replace(row.taught, loss_ST=np.full_like(row.taught.loss_ST, np.inf))
    assert articles(shown([replace(row, taught=broken)]))
