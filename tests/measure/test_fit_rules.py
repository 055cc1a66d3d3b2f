"""The rules of `opdkit fit`, on facts made by hand. Does not show that following the advice trains a better student."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.measure.fit import Advice, Finding, advise
from opdkit.measure.fit_facts import Continuation, Facts, Pattern, Spread, Thresholds
from opdkit.measure.intervals import Difference, Estimate, estimate_difference

NAMES = [
    "ratio",
    "mass_student",
    "mass_teacher",
    "advantage",
    "entropy_gap",
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "teacher_mass_on_student_top",
    "top1_agreement",
]
PATTERN = Pattern(
    student_opening="<assistant>",
    teacher_opening="<assistant>",
    same_prompts=True,
    same_stop_ids=True,
    student_think=0.0,
    teacher_think=0.0,
    student_stop=0.9,
    teacher_stop=0.9,
)


def gain(low: float, high: float, before: float = 0.3) -> Difference:
    value = (low + high) / 2
    return Difference(value=value, low=low, high=high, problems=64, before=before, after=before + value)


def continuation(prefix: int, value: float | None, half: float | None = 0.02) -> Continuation:
    low, high = (None, None) if value is None or half is None else (value - half, value + half)
    before, after = (None, None) if value is None else (0.4, 0.4 + value)
    advantage = Difference(value=value, low=low, high=high, problems=64, before=before, after=after)
    return Continuation(prefix_tokens=prefix, advantage=advantage, num_answers=8)


def facts(overlap: dict[str, float | None] | None = None, **changed: Any) -> Facts:
    """Of a teacher that is better and looks at the same tokens, but for what is changed."""
    said = dict.fromkeys(NAMES, 0.1) | {"ratio": 0.75, "mass_student": 0.98, "mass_teacher": 0.98, "reverse_kl": 0.2}
    good = Facts(
        k=16,
        num_ids=150_000,
        overlap={**said, **(overlap or {})},
        first_token=said,
        top_mass={4: 0.9, 16: 0.98, 64: 0.999},
        coverage={4: 0.85, 16: 0.95, 64: 0.99},
        student=Estimate(value=0.3, low=0.2, high=0.4, problems=64),
        gain=gain(0.1, 0.3),
        continuations=[continuation(0, 0.2), continuation(100, 0.15)],
        reward_auc=0.73,
        pass_rates=[0.0, 0.5, 0.5, 1.0],
        answer_tokens=Spread(median=200, p90=400, longest=900),
        prompt_tokens=Spread(median=50, p90=80, longest=120),
        max_answer_tokens=1024,
        max_prompt_tokens=2048,
        share_truncated=0.01,
        share_unread=0.0,
        share_long_prompts=0.0,
        pattern=PATTERN,
        context="none",
        divergence="reverse_kl",
        support="full",
    )
    return replace(good, **changed)


def of(topic: str, some: Facts, **limits: float) -> Finding:
    (finding,) = [f for f in advise(some, replace(Thresholds(), **limits)).findings if f.topic == topic]
    return finding


def verdict(some: Facts) -> Advice:
    return advise(some, Thresholds())


def test_a_better_teacher_that_looks_at_the_same_tokens_is_to_be_used() -> None:
    advice = verdict(facts())
    assert advice.verdict == "go" and not advice.recipe
    assert {finding.level for finding in advice.findings} == {"good"}


def test_the_student_itself_teaches_nothing() -> None:
    """No divergence: nothing to learn, whatever the sampled answers say; and no key is worth setting."""
    advice = verdict(facts({"reverse_kl": 0.0, "ratio": 1.0}, gain=gain(-0.05, 0.07), share_truncated=0.5))
    assert advice.verdict == "no_gain" and "says what the student says" in advice.sentence and not advice.recipe


def test_a_teacher_that_answers_no_better_will_not_help() -> None:
    """Rethinking OPD: reverse distillation takes a student back to its worse teacher."""
    advice = verdict(facts(gain=gain(-0.2, 0.01)))
    assert advice.verdict == "no_gain" and "no better" in advice.sentence


def test_too_few_answers_are_no_verdict() -> None:
    """An interval that holds both nothing and something, or no measurement, is said to be unclear."""
    assert verdict(facts(gain=gain(-0.1, 0.3))).verdict == "unclear"
    assert "not measured" in verdict(facts(gain=None)).sentence


def test_a_better_teacher_that_looks_elsewhere_starts_cold() -> None:
    """Little overlap that matters: of 16 tokens 4 shared, with 85 % of the mass."""
    low: dict[str, float | None] = {"ratio": 0.25, "mass_student": 0.85, "mass_teacher": 0.85}
    assert verdict(facts(low)).verdict == "cold_start"


def test_lists_that_differ_where_neither_puts_mass_are_enough() -> None:
    """The same 4 of 16 with 99 % of the mass: the rest of the lists is noise, and no reason to start cold."""
    alike: dict[str, float | None] = {"ratio": 0.25, "mass_student": 0.99, "mass_teacher": 0.99}
    assert verdict(facts(alike)).verdict == "go" and of("overlap", facts(alike)).level == "good"


def test_some_overlap_is_enough_to_begin() -> None:
    """Between both limits: said, and no reason to start cold."""
    some: dict[str, float | None] = {"ratio": 0.6, "mass_student": 0.9, "mass_teacher": 0.9}
    assert verdict(facts(some)).verdict == "go" and of("overlap", facts(some)).level == "note"


def test_a_teacher_that_is_lost_in_the_students_answers_starts_cold() -> None:
    """Better from the start, worse from the student's first tokens on, and sure of it; without the interval only told.

    Found on a teacher that was perfect in its own order and could not follow another (docs/guides/fit.md)."""
    lost = [continuation(0, 0.5, 0.1), continuation(4, -0.3, 0.1), continuation(9, 0.0, 0.1)]
    advice = verdict(facts(continuations=lost))
    assert advice.verdict == "cold_start" and "does not recover" in advice.sentence
    unsure = facts(continuations=[continuation(0, 0.5, 0.1), continuation(4, -0.05, 0.1)])
    assert verdict(unsure).verdict == "go" and of("prefixes", unsure).level == "note"


def test_unknown_overlap_is_not_good() -> None:
    """Where no token is shared the masses are not defined; that is as far apart as it gets, not unknown."""
    nothing: dict[str, float | None] = {"ratio": 0.0, "mass_student": None, "mass_teacher": None}
    assert verdict(facts(nothing)).verdict == "cold_start"


def test_another_chat_pattern_is_aligned_first() -> None:
    """Other openings and little overlap: align. The same difference without consequences is only said."""
    pattern = replace(PATTERN, teacher_opening="<assistant><think>")
    apart: dict[str, float | None] = {"ratio": 0.2, "mass_student": 0.6, "mass_teacher": 0.6}
    advice = verdict(facts(apart, pattern=pattern))
    assert advice.verdict == "align" and "<think>" in advice.sentence
    assert verdict(facts(pattern=pattern)).verdict == "go" and of("pattern", facts(pattern=pattern)).level == "warn"


def test_a_thinking_teacher_of_a_student_that_does_not_think() -> None:
    """Think tags in all of one side's answers and none of the other's need aligning whatever the overlap says."""
    assert verdict(facts(pattern=replace(PATTERN, teacher_think=1.0))).verdict == "align"
    assert verdict(facts(pattern=replace(PATTERN, teacher_think=None, student_think=1.0))).verdict == "go"


def test_a_teacher_that_would_not_stop_there() -> None:
    finding = of("pattern", facts(pattern=replace(PATTERN, teacher_stop=0.01)))
    assert finding.level == "warn" and "would go on" in finding.sentence


@pytest.mark.parametrize(
    ("coverage", "divergence", "keys"),
    [
        (0.95, "reverse_kl", {}),
        (0.95, "forward_kl", {}),
        (0.5, "reverse_kl", {"schedule.divergence": "forward_then_reverse"}),
        (0.5, "forward_kl", {}),
        (0.5, None, {}),
    ],
)
def test_direction(coverage: float, divergence: str | None, keys: dict[str, str]) -> None:
    """A method's own direction stays, but for reverse KL where the student does not propose what the teacher wants."""
    some = facts(coverage={4: 0.1, 16: coverage, 64: 0.99}, divergence=divergence)
    assert of("direction", some).recipe == keys


def test_k_is_the_shortest_list_that_carries_the_mass() -> None:
    """16 carry 98 %, so 16; a method without a list is told, not changed; nothing carries it: the full vocabulary."""
    assert of("k", facts(support="student_topk")).recipe == {"method.k": 16}
    assert of("k", facts(support="student_topk"), mass_good=0.9).recipe == {"method.k": 4}
    assert of("k", facts(support="full")).recipe == {}
    assert of("k", facts(support="union"), mass_good=0.9999).recipe == {"method.support": "full"}


def test_problems_that_are_never_or_always_solved() -> None:
    assert of("problems", facts(pass_rates=[0.0] * 8 + [0.5])).level == "note"
    assert (
        "50 % of 4 problems are never solved, 25 % always" in of("problems", facts(pass_rates=[0, 0, 0.5, 1])).sentence
    )
    assert of("problems", facts(pass_rates=[])).level == "unknown"


def test_truncated_answers_want_a_longer_cap_up_to_where_the_papers_collapse() -> None:
    assert of("answers", facts(share_truncated=0.5)).recipe == {"sampling.max_answer_tokens": 2048}
    long = facts(share_truncated=0.5, max_answer_tokens=4096)
    assert of("answers", long).recipe == {} and "unstable" in of("answers", long).sentence


def test_long_answers_are_capped_where_the_teacher_no_longer_helps() -> None:
    """Helps at 0 and 4000, no longer from 8000 on: the cap. Short answers are left alone and only told."""
    grid = [continuation(0, 0.3), continuation(4000, 0.1), continuation(8000, -0.01), continuation(12000, 0.0)]
    long = facts(continuations=grid, answer_tokens=Spread(median=9000, p90=15000, longest=16000))
    assert of("answers", long).recipe == {"sampling.max_answer_tokens": 8000}
    short = of("answers", facts(continuations=grid))
    assert short.recipe == {} and "From 8000 tokens on" in short.sentence


def test_an_unknown_advantage_says_nothing() -> None:
    """Where nobody got that far, the last prefix that was measured decides; where nothing is known, nothing is said."""
    assert "still helps" in of("answers", facts(continuations=[continuation(0, 0.3), continuation(9, None)])).sentence
    assert "At no prefix" in of("answers", facts(continuations=[continuation(0, 0.0), continuation(9, None)])).sentence
    assert "teacher" not in of("answers", facts(continuations=[continuation(0, None)])).sentence


def test_a_list_as_long_as_the_vocabulary_is_said_to_share_by_chance() -> None:
    assert "use a smaller k" in of("overlap", facts(k=16, num_ids=20)).sentence


def test_every_threshold_has_a_source_and_can_be_moved() -> None:
    assert all(f.metadata["source"] for f in fields(Thresholds))
    moved = Thresholds().changed({"overlap_low": 0.8, "overlap_good": 1})
    assert moved.overlap_low == 0.8 and moved.overlap_good == 1.0
    with pytest.raises(UserError, match=r"--threshold overlap is not a threshold; they are overlap_good, overlap_low"):
        Thresholds().changed({"overlap": 0.5})
    with pytest.raises(UserError, match=r"overlap_low=high: give a number"):
        Thresholds().changed({"overlap_low": "high"})


def test_identical_zeros_are_no_proof() -> None:
    """Nobody solves anything: 12 and 64 problems without a difference leave everything open; 300 settle it."""
    for problems, level in ((9, "unknown"), (12, "unknown"), (64, "unknown"), (300, "stop")):
        same = estimate_difference([0.0] * problems, [0.0] * problems)
        said = of("teacher", facts(gain=same))
        assert said.level == level, said.sentence
        assert ("too few to tell" in said.sentence) == (problems == 9)
    nothing = [Continuation(prefix_tokens=p, advantage=estimate_difference([0.0] * 64, [0.0] * 64), num_answers=64)
               for p in (0, 4000, 8000)]  # fmt: skip
    long = of("answers", facts(continuations=nothing, answer_tokens=Spread(median=9000, p90=15000, longest=16000)))
    assert long.recipe == {} and "not settled" in long.sentence


def test_few_problems_settle_nothing() -> None:
    """9 problems that the teacher alone solves: too few to tell, whatever the interval."""
    few = estimate_difference([0.0] * 9, [1.0] * 9)
    assert few["low"] is not None and few["low"] > 0
    assert of("teacher", facts(gain=few)).level == "unknown" and verdict(facts(gain=few)).verdict == "unclear"
    lost = [Continuation(prefix_tokens=4, advantage=estimate_difference([1.0] * 9, [0.0] * 9), num_answers=9)]
    assert of("prefixes", facts(continuations=lost)).level == "note"
