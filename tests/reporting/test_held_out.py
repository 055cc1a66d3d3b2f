"""Before and after on the same problems: what the page claims, and what it says of answers it cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_run import DATASET, write_answers
from test_page import read

from opdkit.reporting.run import read_run
from opdkit.reporting.sections.held_out import moved


def test_the_paired_difference_leads(run_folder: Path) -> None:
    """16 problems, a quarter gains 1, one loses 1, the rest stays: +3/16, and the counts that it comes from."""
    write_answers(run_folder, 0, [0.0] * 4 + [1.0] + [0.5] * 11)
    write_answers(run_folder, 30, [1.0] * 4 + [0.0] + [0.5] * 11)
    found, unread = moved(read_run(run_folder))
    assert found[DATASET].difference["value"] == pytest.approx(3 / 16) and unread == []
    assert found[DATASET].by_gain()[:4] == ["p00", "p01", "p02", "p03"] and found[DATASET].by_gain()[-1] == "p04"
    text = read(run_folder).text
    assert "the difference, +0.188 on the same problems, 95 % interval [" in text and "], may be chance." in text
    assert "Of 16 problems, 4 have a higher mean reward than before, 1 a lower one, 11 the same." in text
    assert "Gained mostbeforeafterp000.0001.000" in text and "Lost mostbeforeafterp041.0000.000" in text


def test_a_rise_on_every_problem(run_folder: Path) -> None:
    """Every problem gains a half: an interval above 0, though the two means' own intervals are wide."""
    write_answers(run_folder, 0, [0.0, 0.5] * 8)
    write_answers(run_folder, 30, [0.5, 1.0] * 8)
    said = "the student rose from 0.229 to 0.836: +0.500 on the same problems, 95 % interval [+0.235, +0.572]."
    assert said in read(run_folder).text


def test_without_answers_nothing_is_claimed(run_folder: Path) -> None:
    assert moved(read_run(run_folder)) == ({}, [])
    write_answers(run_folder, 30, [1.0] * 4)
    assert moved(read_run(run_folder)) == ({}, [])


def test_damaged_answers_are_a_sentence(run_folder: Path) -> None:
    write_answers(run_folder, 0, [0.0, 0.5])
    (run_folder / "eval" / "step_000030.jsonl").write_text('nonsense\n{"a": 1}\n')
    text = read(run_folder).text
    assert "the problems of before and after are not compared." in text and "the 95 % intervals are apart" in text


def test_few_problems_settle_nothing(run_folder: Path) -> None:
    """All of 9 gained: too few to tell; all of 10: a rise."""
    for problems, said in ((9, "; 9 problems are too few to tell whether that is chance."), (10, "the student rose")):
        write_answers(run_folder, 0, [0.0] * problems)
        write_answers(run_folder, 30, [1.0] * problems)
        assert said in read(run_folder).text


def test_no_change_at_all_may_be_chance(run_folder: Path) -> None:
    """Nobody solves anything before or after: an interval around 0 that has width."""
    write_answers(run_folder, 0, [0.0] * 30)
    write_answers(run_folder, 30, [0.0] * 30)
    assert "95 % interval [-0.118, +0.118], may be chance." in read(run_folder).text
