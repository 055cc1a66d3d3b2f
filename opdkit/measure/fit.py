"""Will this teacher help this student? Facts of a few hundred answers in, findings, a verdict and recipe keys out.

The rules are here and nowhere else, one function a topic; `analysis/fit.py` makes the facts, `fit_facts.py` says what
they are and holds every limit. A rule that lacks its number says so and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opdkit.measure.fit_facts import Continuation, Facts, Thresholds
from opdkit.measure.intervals import FEW, side_of

Level = Literal["good", "note", "warn", "stop", "unknown"]
Verdict = Literal["go", "cold_start", "align", "no_gain", "unclear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    topic: str
    level: Level
    sentence: str
    recipe: Mapping[str, Any] = field(default_factory=dict)  # keys to set


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    verdict: Verdict
    sentence: str
    findings: Sequence[Finding]
    recipe: Mapping[str, Any]


def advise(facts: Facts, limits: Thresholds) -> Advice:
    """All findings, and what they come to. The first of these that holds is the verdict:

    align       the teacher is asked or ends in another way, and looks at other tokens
    no_gain     the teacher says what the student says, or answers no better
    cold_start  it answers better, but looks at other tokens, or ends worse than the student from the student's own
                beginnings: teach its answers first
    unclear     the answers were too few to say that it is better, or it was not asked to answer
    go          it answers better and looks at the same tokens
    """
    findings = [finding for rule in RULES for finding in rule(facts, limits)]
    at = {finding.topic: finding for finding in findings}
    lost = "prefixes" in at and at["prefixes"].level == "warn"
    apart, strange = at["overlap"].level == "warn", at["pattern"].level in ("warn", "stop")
    gain = at["teacher"].level
    if strange and (apart or at["pattern"].level == "stop"):
        verdict: Verdict = "align"
    elif at["divergence"].level == "stop" or gain == "stop":
        verdict = "no_gain"
    elif apart or lost:
        verdict = "cold_start"
    else:
        verdict = "go" if gain == "good" else "unclear"
    keys = {} if verdict == "no_gain" else {k: v for finding in findings for k, v in finding.recipe.items()}
    reason = {
        "align": at["pattern"].sentence,
        "no_gain": at["divergence" if at["divergence"].level == "stop" else "teacher"].sentence,
        "cold_start": at["prefixes" if lost and not apart else "overlap"].sentence,
        "unclear": at["teacher"].sentence,
        "go": f"{at['teacher'].sentence} {at['overlap'].sentence}",
    }[verdict]
    return Advice(verdict=verdict, sentence=f"{HEADLINES[verdict]} {reason}", findings=findings, recipe=keys)


HEADLINES: Mapping[Verdict, str] = {
    "go": "This teacher should help.",
    "cold_start": "Cold start first: supervised steps on the teacher's answers, then on-policy distillation.",
    "align": "Align the prompts of teacher and student first.",
    "no_gain": "This teacher will not help.",
    "unclear": "Unclear whether this teacher helps.",
}


def overlap_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    ratio, mass = facts.overlap["ratio"], _smaller(facts.overlap["mass_student"], facts.overlap["mass_teacher"])
    said = f"They share {_share(ratio)} of their {facts.k} likeliest tokens, which carry {_share(mass)} of the mass"
    chance = facts.k / facts.num_ids
    if chance > limits.chance_high:
        said += f" (two random lists of {facts.k} among {facts.num_ids} share {_share(chance)}: use a smaller k)"
    if (
        ratio is None
        or mass is None
        or mass < limits.mass_low
        or (ratio < limits.overlap_low and mass < limits.mass_good)
    ):
        yield Finding(
            topic="overlap", level="warn", sentence=f"{said}: too few for the teacher's signal to reach the student."
        )
    elif ratio >= limits.overlap_good or mass >= limits.mass_good:
        yield Finding(topic="overlap", level="good", sentence=f"{said}.")
    else:
        yield Finding(topic="overlap", level="note", sentence=f"{said}: enough to begin; it should rise in training.")
    gap = facts.overlap["entropy_gap"]
    both = f"{_nats(facts.overlap['student_entropy'])} and {_nats(facts.overlap['teacher_entropy'])}"
    wide = gap is not None and gap > limits.entropy_gap_high
    yield Finding(
        topic="entropy",
        level="warn" if wide else "good",
        sentence=f"Entropies of student and teacher: {both} nats a token, {_nats(gap)} apart"
        + (": one is sure where the other is not." if wide else "."),
    )


def divergence_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    value = facts.overlap["reverse_kl"]
    said = f"KL(student || teacher) is {_nats(value)} nats a token"
    nothing = value is not None and value < limits.divergence_min
    yield Finding(
        topic="divergence",
        level="stop" if nothing else "good",
        sentence=f"{said}: the teacher says what the student says." if nothing else f"{said}.",
    )


def teacher_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    gain = facts.gain
    read = (
        "" if facts.context == "none" else f" (reading the context {facts.context!r}, which the student does not see)"
    )
    if gain is None or gain["value"] is None or gain["low"] is None or gain["high"] is None:
        why = "" if facts.pass_rates else ": no answer could be graded"
        said = f"Whether the teacher answers better was not measured{why}."
        yield Finding(topic="teacher", level="unknown", sentence=said)
    else:
        scores = f"it scores {_share(gain['after'])}{read} where the student scores {_share(gain['before'])}"
        between = f"[{gain['low']:+.2f}, {gain['high']:+.2f}]"
        if gain["problems"] < FEW:
            yield Finding(
                topic="teacher",
                level="unknown",
                sentence=f"{gain['problems']} problems are too few to tell whether the teacher is better: {scores}; "
                f"ask {FEW} or more.",
            )
        elif side_of(gain, at=limits.gain_min) == "below":
            yield Finding(
                topic="teacher", level="stop", sentence=f"The teacher is no better: {scores}, a gain of {between}."
            )
        elif side_of(gain) != "above" or (gain["value"] or 0.0) < limits.gain_min:
            yield Finding(
                topic="teacher",
                level="unknown",
                sentence=f"The teacher may be better: {scores}, a gain of {between}: ask more problems.",
            )
        else:
            yield Finding(
                topic="teacher", level="good", sentence=f"The teacher is better: {scores}, a gain of {between}."
            )
    if facts.reward_auc is not None:
        weak = facts.reward_auc < limits.reward_auc_low
        yield Finding(
            topic="ranking",
            level="note" if weak else "good",
            sentence=f"Its score tells the student's right answers from the wrong ones with an AUC of "
            f"{facts.reward_auc:.2f}" + (": hardly better than chance." if weak else "."),
        )


def continuation_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """On-policy, the teacher is asked in the student's states and nowhere else: it must know its way there."""
    begun = sorted((c for c in facts.continuations if c.prefix_tokens), key=lambda c: c.prefix_tokens)
    if not begun or begun[0].advantage["value"] is None:
        return
    first, value = begun[0].prefix_tokens, begun[0].advantage["value"]
    said = f"Going on from the student's first {first} tokens the teacher's reward is {value:+.2f} to the student's"
    lost = side_of(begun[0].advantage) == "below"
    yield Finding(
        topic="prefixes",
        level="warn" if lost else "good" if value >= limits.continuation_min else "note",
        sentence=f"{said}: it does not recover from what the student wrote." if lost else f"{said}.",
    )


def pattern_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """Thinking-pattern consistency (Rethinking OPD, claim 1): asked alike, thinking alike, ending alike."""
    pattern, faults, hard = facts.pattern, [], False
    if facts.heard is not None:
        pass  # each in its own template, in its own tokens
    elif pattern.student_opening != pattern.teacher_opening:
        faults.append(
            f"answers open with {pattern.student_opening!r}, for the teacher with {pattern.teacher_opening!r}"
        )
    elif not pattern.same_prompts:
        faults.append("their chat templates write the question in other ways")
    teacher_think = pattern.teacher_think
    if teacher_think is not None and abs(teacher_think - pattern.student_think) > limits.think_difference:
        hard = True
        faults.append(f"think tags stand in {_share(pattern.student_think)} of its answers and in "
                      f"{_share(teacher_think)} of the teacher's")  # fmt: skip
    if not pattern.same_stop_ids and facts.heard is None:
        faults.append("their answers end with other stop tokens")
    stop, teacher_stop = pattern.student_stop, pattern.teacher_stop
    if stop is not None and teacher_stop is not None and teacher_stop < limits.stop_ratio * stop:
        faults.append(f"where the student stops (probability {stop:.2f}) the teacher would go on ({teacher_stop:.3f})")
    if not faults:
        yield Finding(topic="pattern", level="good", sentence="Both are asked in the same words and end alike.")
        return
    sentence = f"The student is asked, thinks or ends in another way: {'; '.join(faults)}."
    yield Finding(topic="pattern", level="stop" if hard else "warn", sentence=sentence)


def tokens_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """How much of the answers a teacher with another tokenizer can be heard on."""
    if facts.heard is None:
        return
    single, digits = facts.heard["one_to_one"], facts.heard["digits_one_to_one"]
    said = (
        f"{_share(single)} of the tokens are one token in the teacher's tokenizer too ({_share(digits)} of those with "
        f"digits), {_share(facts.heard['merged'])} are in spans of several, {_share(facts.heard['masked'])} in none"
    )
    if single is not None and min(single, single if digits is None else digits) >= limits.one_to_one_good:
        yield Finding(topic="tokens", level="good", sentence=f"{said}.")
    else:
        yield Finding(
            topic="tokens",
            level="note",
            sentence=f'{said}: span = "exact" leaves these out; try "macro" or "even" beside it (support = "sampled").',
        )


def direction_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """Can reverse KL reach what the teacher wants? Asked of as many of the student's tokens as carry its own mass."""
    k = _enough(facts, limits)
    if k is None:
        return
    covered = facts.coverage[k]
    said = f"{_share(covered)} of the teacher's probability is on the student's {k} likeliest tokens"
    if covered >= limits.coverage:
        yield Finding(
            topic="direction",
            level="good",
            sentence=f"{said}: reverse KL, on the student's own answers, can reach it.",
        )
    else:
        yield Finding(
            topic="direction",
            level="note",
            sentence=f"{said}: reverse KL hardly moves what the student does not propose; begin with forward KL.",
            recipe={"schedule.divergence": "forward_then_reverse"} if facts.divergence == "reverse_kl" else {},
        )


def k_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """For methods that compare a list of entries; for the others the sentence says what a list would hold."""
    k = _enough(facts, limits)
    if k is None:
        return
    uses_list = facts.support not in (None, "full", "sampled")
    said = f"carry {_share(facts.top_mass[k])} of either side's mass"
    if facts.top_mass[k] >= limits.mass_good:
        yield Finding(
            topic="k", level="good", sentence=f"{k} tokens {said}.", recipe={"method.k": k} if uses_list else {}
        )
    else:
        yield Finding(
            topic="k",
            level="note",
            sentence=f"Even {k} tokens {said}: use {'a longer list' if facts.heard else 'the full vocabulary'}.",
            recipe={"method.support": "full"} if uses_list and not facts.heard else {},
        )


def _enough(facts: Facts, limits: Thresholds) -> int | None:
    """The shortest measured list that carries both sides' mass, else the longest; None: none was measured."""
    fitting = [k for k in sorted(facts.top_mass) if facts.top_mass[k] >= limits.mass_good]
    return fitting[0] if fitting else max(facts.top_mass, default=None)


def problems_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    rates = facts.pass_rates
    if not rates:
        yield Finding(topic="problems", level="unknown", sentence="No answer could be graded.")
        return
    never, always = (sum(rate == end for rate in rates) / len(rates) for end in (0.0, 1.0))
    few = 1 - never - always < limits.solved_sometimes
    said = f"{_share(never)} of {len(rates)} problems are never solved, {_share(always)} always"
    tail = ": rewards and pass-rate weights see few problems, and solved ones teach little." if few else "."
    yield Finding(topic="problems", level="note" if few else "good", sentence=said + tail)


def prompts_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    prompts, limit = facts.prompt_tokens, facts.max_prompt_tokens
    if facts.share_long_prompts or facts.share_unread:
        yield Finding(
            topic="prompts",
            level="warn" if max(facts.share_long_prompts, facts.share_unread) > limits.truncated_high else "note",
            sentence=f"{_share(facts.share_long_prompts)} of the problems are left out (prompts over {limit} tokens); "
            f"the teacher cannot read {_share(facts.share_unread)} of the answers.",
        )
    else:
        yield Finding(
            topic="prompts",
            level="good",
            sentence=f"Prompts have {prompts.median:.0f} tokens, at most {prompts.longest} (limit {limit}).",
        )


def answers_rule(facts: Facts, limits: Thresholds) -> Iterator[Finding]:
    """Their length against the cap, and from where on the teacher no longer helps."""
    answers, cap = facts.answer_tokens, facts.max_answer_tokens
    fades = _fades_at(facts.continuations, limits.continuation_min)
    helps = _helps(facts.continuations, fades)
    said = f"Answers have {answers.median:.0f} tokens (nine of ten up to {answers.p90:.0f}, cap {cap})"
    if fades and answers.p90 > limits.long_answer_tokens:
        keys = {"sampling.max_answer_tokens": fades}
        yield Finding(topic="answers", level="warn", sentence=f"{said}.{helps} Cap them there.", recipe=keys)
    elif facts.share_truncated > limits.truncated_high:
        fits = 2 * cap <= limits.long_answer_tokens
        advice = f" Try {2 * cap}." if fits else " Longer caps were unstable in the papers: prefer shorter answers."
        yield Finding(
            topic="answers",
            level="warn",
            sentence=f"{said}: {_share(facts.share_truncated)} are cut off.{helps}{advice}",
            recipe={"sampling.max_answer_tokens": 2 * cap} if fits else {},
        )
    else:
        yield Finding(topic="answers", level="good", sentence=f"{said}.{helps}")


RULES: Sequence[Callable[[Facts, Thresholds], Iterator[Finding]]] = (
    overlap_rule,
    divergence_rule,
    teacher_rule,
    continuation_rule,
    pattern_rule,
    tokens_rule,
    direction_rule,
    k_rule,
    problems_rule,
    prompts_rule,
    answers_rule,
)


def _fades_at(continuations: Sequence[Continuation], least: float) -> int | None:
    """The shortest measured prefix from which on the interval of the teacher's advantage is below `least`; None: it is
    not there yet at the longest, or the problems are too few."""
    fades = None
    for continuation in sorted(continuations, key=lambda c: c.prefix_tokens, reverse=True):
        if continuation.advantage["value"] is None:
            continue
        if side_of(continuation.advantage, at=least) != "below":
            break
        fades = continuation.prefix_tokens
    return fades


def _helps(continuations: Sequence[Continuation], fades: int | None) -> str:
    known = [continuation for continuation in continuations if continuation.advantage["value"] is not None]
    if not known:
        return ""
    if fades is None:
        last = max(known, key=lambda continuation: continuation.prefix_tokens)
        if side_of(last.advantage) == "above":
            return " The teacher still helps at the last prefix measured."
        return " Whether the teacher still helps at the last prefix measured is not settled: ask more problems."
    if fades == 0:
        return " At no prefix does the teacher end better than the student."
    return f" From {fades} tokens on the teacher, going on from them, ends no better than the student."


def _smaller(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else min(a, b)


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{100 * value:.0f} %"


def _nats(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
