"""Sentinels: what the numbers of a run say that its user must hear at once, and what the recipe does about it.

Every look is a function of the run's history and its recipe: it gives a sentence, and the first step that it is about.
So a resumed run decides as an uninterrupted one does. The limits, and where they are from: `recipe/sentinels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal, NamedTuple

import numpy as np

from opdkit.metric_lines import SENTINELS
from opdkit.metric_lines import found as found_in
from opdkit.metrics import Metric
from opdkit.recipe import Recipe
from opdkit.run.history import History, Line, is_known, shares, values

Action = Literal["none", "pause", "rollback", "stop"]
Limit = float | Literal[False]  # false: not watched
# Nats: of the mean and of the 99.9th percentile. A sampler whose gap is wider computes something else than the trainer.
GAP_LIMITS = {"float32": (0.001, 0.05), "bfloat16": (0.02, 0.5)}
STANDARD_ERRORS = 3.0  # by which two windows must be apart, where few answers make a number

# What they look at, of a step.
WATCHED = frozenset(
    {
        *(
            "rollout/answer_tokens",
            "rollout/num_rows",
            "rollout/num_looping",
            "rollout/num_truncated",
            "rollout/reward",
        ),
        *("rollout/share_of_groups_with_one_reward", "rollout/sampler_gap_bias", "rollout/sampler_gap_p999"),
        *("rollout/ess", "rollout/lag", "student/entropy", "overlap/mass_teacher", "train/loss", "train/grad_norm"),
        "schedule/sampling.max_answer_tokens",
    }
)
_LENGTH, _LIMIT = "rollout/answer_tokens", "schedule/sampling.max_answer_tokens"


class Said(NamedTuple):
    sentence: str
    since: int  # the first step that the sentence is about: what was saved before it is sound, as far as is known


class Finding(NamedTuple):
    name: str
    sentence: str
    since: int

    @property
    def named(self) -> str:
        return f"{self.sentence} (sentinels.{self.name})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the sentinels say after a step."""

    found: tuple[Finding, ...] = ()
    new: tuple[Finding, ...] = ()  # those that no step of the last window had
    action: Action = "none"
    because: tuple[Finding, ...] = ()  # what is acted upon

    def metrics(self) -> list[Metric]:
        """`sentinels/num_found`, and `sentinels/<name>` = 1 for each that found something."""
        return [
            Metric(f"{SENTINELS}num_found", float(len(self.found)), "last"),
            *(Metric(f"{SENTINELS}{finding.name}", 1.0, "last") for finding in self.found),
        ]

    @property
    def why(self) -> str:
        return "; ".join(one.named for one in self.because)


def judge(history: History, recipe: Recipe, *, num_rollbacks: int = 0) -> Verdict:
    """The last line of `history.steps` is the step that was just taken. recipe: as written, or of this step.

    What is acted upon is new: a run that goes on behind a pause is not paused again by the same finding until it has
    been gone for a window of steps.
    """
    section = recipe.sentinels
    found = tuple(find(history, recipe))
    before = history.steps[-section.window - 1 : -1]
    new = tuple(one for one in found if not any(one.name in found_in(line) for line in before))
    because = tuple(one for one in new if one.name in section.acts)  # none for "warn"
    action: Action = section.action if because and section.action != "warn" else "none"
    if action == "rollback" and num_rollbacks >= section.max_rollbacks:
        action = "stop"
    return Verdict(found, new, action, because)


def find(history: History, recipe: Recipe) -> Iterator[Finding]:
    """Of every sentinel that is on and has enough to look at, what it found."""
    if history.steps:
        for name, look in LOOKS.items():
            said = look(history, recipe)
            if said is not None:
                yield Finding(name, *said)


@dataclass(frozen=True, slots=True)
class _Windows:
    """The first and the last window of a run, which do not overlap; None of a run that is too short."""

    begin: Sequence[Line]
    now: Sequence[Line]

    @classmethod
    def of(cls, history: History, size: int) -> _Windows | None:
        return cls(history.first(size), history.last(size)) if len(history.steps) >= 2 * size else None

    @property
    def since(self) -> int:
        return int(self.now[0]["step"])


def _length(history: History, recipe: Recipe) -> Said | None:
    limit, windows = recipe.sentinels.length, _Windows.of(history, recipe.sentinels.window)
    if windows is None or not limit:
        return None
    begin, now = (_mean_length(part) for part in (windows.begin, windows.now))
    if not begin or now is None or begin / limit < now < begin * limit:
        return None
    factor = f"{now / begin:.2g} times" if now > begin else f"{now / begin:.2g} of"
    of = " of sampling.max_answer_tokens" if _LIMIT in windows.now[-1] else " tokens"
    return Said(
        f"answers are {factor} what they were in the first {len(windows.begin)} steps (mean {now:.3g}{of}, then "
        f"{begin:.3g})",
        windows.since,
    )


def _mean_length(lines: Sequence[Line]) -> float | None:
    """In tokens; as a share of the limit where that is scheduled."""
    if any(line.get(_LIMIT) for line in lines):
        return _mean(shares(lines, _LENGTH, _LIMIT))
    return _mean(values(lines, _LENGTH))


def _risen(history: History, recipe: Recipe, name: str, limit: Limit, what: str) -> Said | None:
    """The share of answers that the metric `name` counts, above what it was, and by more than chance."""
    windows = _Windows.of(history, recipe.sentinels.window)
    if windows is None or not limit:
        return None
    counts = [(sum(values(part, name)), sum(values(part, "rollout/num_rows"))) for part in (windows.begin, windows.now)]
    if not all(num_rows for _, num_rows in counts):
        return None
    (begin, now), of_all = (count / num for count, num in counts), sum(c for c, _ in counts) / sum(n for _, n in counts)
    error = math.sqrt(of_all * (1 - of_all) * sum(1 / num for _, num in counts))
    if now - begin < limit or now - begin <= STANDARD_ERRORS * error:
        return None
    return Said(f"{now:.0%} of the answers {what}, where {begin:.0%} did in the first steps", windows.since)


def _repetition(history: History, recipe: Recipe) -> Said | None:
    what = "end in the same tokens again and again"
    return _risen(history, recipe, "rollout/num_looping", recipe.sentinels.repetition, what)


def _unending(history: History, recipe: Recipe) -> Said | None:
    what = "do not end before sampling.max_answer_tokens"
    return _risen(history, recipe, "rollout/num_truncated", recipe.sentinels.unending, what)


def _entropy(history: History, recipe: Recipe) -> Said | None:
    limit, windows = recipe.sentinels.entropy, _Windows.of(history, recipe.sentinels.window)
    if windows is None or not limit:
        return None
    begin, now = (_mean(values(part, "student/entropy")) for part in (windows.begin, windows.now))
    if begin is None or now is None or now >= limit * begin:
        return None
    return Said(f"the student's entropy is {now:.2g} nats, {now / begin:.1%} of what it was", windows.since)


def _reward(history: History, recipe: Recipe) -> Said | None:
    """Now against the window of the highest mean reward, of those that were over when this one began."""
    limit, size = recipe.sentinels.reward, recipe.sentinels.window
    lines = [line for line in history.steps if is_known(line, "rollout/reward") and is_known(line, "train/loss")]
    if not limit or len(lines) < 2 * size or size < 2:
        return None
    reward_S, loss_S = (np.array(values(lines, name)) for name in ("rollout/reward", "train/loss"))
    means_S = np.convolve(reward_S[:-size], np.full(size, 1 / size), mode="valid")
    best = int(means_S.argmax())
    then_S, now_S = reward_S[best : best + size], reward_S[-size:]
    fall = float(then_S.mean() - now_S.mean())
    error = math.sqrt((variance(then_S.tolist()) + variance(now_S.tolist())) / size)
    losses = float(loss_S[best : best + size].mean()), float(loss_S[-size:].mean())
    if fall < limit or fall <= STANDARD_ERRORS * error or losses[1] >= losses[0]:
        return None
    return Said(
        f"the reward has fallen to {now_S.mean():.3g}, from {then_S.mean():.3g} around step {lines[best]['step']}, "
        f"while the loss has fallen too ({losses[0]:.3g} to {losses[1]:.3g})",
        int(lines[-size]["step"]),
    )


def _pass_at_k(history: History, recipe: Recipe) -> Said | None:
    limit = recipe.sentinels.pass_at_k
    if not limit or len(history.evaluations) < 2:
        return None
    first, before, now = history.evaluations[0], *history.evaluations[-2:]
    if now["step"] < history.steps[-1]["step"] - 1:
        return None  # it was judged after the step that followed it
    for name in _largest_k(now):
        if not (is_known(first, name) and is_known(first, f"{name}_low") and is_known(now, f"{name}_high")):
            continue
        if first[name] - now[name] >= limit and now[f"{name}_high"] < first[f"{name}_low"]:
            return Said(
                f"{name} is {now[name]:.3g} after {now['step']} steps, and was {first[name]:.3g} after "
                f"{first['step']}: fewer problems are within reach of any answer",
                int(before["step"]) + 1,
            )
    return None


def _largest_k(line: Line) -> Iterator[str]:
    """The name of pass@k of every data set, with its largest k."""
    largest: dict[str, tuple[int, str]] = {}
    for name in line:
        data, _, quantity = name.rpartition("/")
        k = quantity.removeprefix("pass_at_")
        if quantity != k and k.isdigit():
            largest[data] = max(largest.get(data, (0, "")), (int(k), name))
    return (name for k, name in largest.values() if k > 1 and is_known(line, name))


def _non_finite(history: History, recipe: Recipe) -> Said | None:
    """A value that is not finite is written as null: these two are always known otherwise."""
    limit = recipe.sentinels.non_finite
    last = history.last(limit or 1)
    if (
        not limit
        or len(last) < limit
        or any(is_known(line, "train/loss") and is_known(line, "train/grad_norm") for line in last)
    ):
        return None
    which = "loss" if not is_known(last[-1], "train/loss") else "gradient"
    row = f" {limit} times in a row" if limit > 1 else ""
    return Said(f"the {which} is not finite{row}: the step changed nothing", int(last[0]["step"]))


def _teacher_mass(history: History, recipe: Recipe) -> Said | None:
    """Over as many comparisons as a window has, the first and the last."""
    limit, size = recipe.sentinels.teacher_mass, recipe.sentinels.window
    points = history.points("overlap/mass_teacher")
    num = max(1, size // max(1, recipe.diagnostics.every))
    if not limit or len(points) < 2 * num or points[-1].step != history.steps[-1]["step"]:
        return None
    begin, now = (fmean(point.value for point in part) for part in (points[:num], points[-num:]))
    if begin - now < limit:
        return None
    return Said(
        f"the teacher gives {now:.0%} of its probability to the tokens that both find likely, and gave {begin:.0%}: "
        "the student goes where the teacher has little to say",
        points[-num - 1].step + 1,
    )


def _sampler_gap(history: History, recipe: Recipe) -> Said | None:
    last = history.steps[-1]
    sentence = wide_gap(last, recipe.model.dtype, recipe.sentinels.sampler_gap, recipe.sentinels.sampler_gap_p999)
    return None if sentence is None else Said(sentence, int(last["step"]))


def wide_gap(seen: Line, dtype: str, most_bias: Limit | None = None, most_p999: Limit | None = None) -> str | None:
    """A sentence if the metrics of a step are over the limits (None: those of this dtype)."""
    bias, p999 = seen.get("rollout/sampler_gap_bias"), seen.get("rollout/sampler_gap_p999")
    limits = [GAP_LIMITS[dtype][n] if most is None else most for n, most in enumerate((most_bias, most_p999))]
    gaps = [None if gap is None else abs(gap) for gap in (bias, p999)]
    # Written so that a number that is not finite is over every limit.
    if not any(most and gap is not None and not gap <= most for most, gap in zip(limits, gaps, strict=True)):
        return None
    said_bias, said_p999 = (f"{math.nan if gap is None else gap:{sign}.2g}" for gap, sign in ((bias, "+"), (p999, "")))
    within = " and ".join(f"{most}" for most in limits if most)
    return (
        f"the sampler's log-probs are not the trainer's: they differ by {said_bias} nats in the mean and by "
        f"{said_p999} at the 99.9th percentile, where rounding in {dtype} stays within {within}; "
        "ratios to the sampler, and estimates from sampled tokens, are off by as much "
        "(rollout/sampler_gap_bias, _mean, _p999)"
    )


def _stale_sampler(history: History, recipe: Recipe) -> Said | None:
    limit, last = recipe.sentinels.stale_sampler, history.last(recipe.sentinels.window)
    known = values(last, "rollout/ess")
    if not limit or len(known) < recipe.sentinels.window or fmean(known) >= limit:
        return None
    lag = _mean(values(last, "rollout/lag")) or 0.0
    return Said(
        f"the answers are worth {fmean(known):.0%} as many of the student's own (rollout/ess), {lag:.2g} steps after "
        "it sampled them: lower sampling.lag, train.updates_per_step or train.lr",
        int(last[0]["step"]),
    )


def _no_signal(history: History, recipe: Recipe) -> Said | None:
    limit, last = recipe.sentinels.no_signal, history.last(recipe.sentinels.window)
    known = values(last, "rollout/share_of_groups_with_one_reward")
    if not recipe.method.compares_rewards or not limit or len(known) < recipe.sentinels.window or fmean(known) < limit:
        return None
    reward = _mean(values(last, "rollout/reward"))
    return Said(
        f"in {fmean(known):.0%} of the groups all answers have one reward, and teach nothing (mean reward "
        f"{'unknown' if reward is None else f'{reward:.3g}'}): take problems that are sometimes solved, or more "
        "answers to each",
        int(last[0]["step"]),
    )


Look = Callable[[History, Recipe], Said | None]
LOOKS: dict[str, Look] = {
    "length": _length,
    "repetition": _repetition,
    "unending": _unending,
    "entropy": _entropy,
    "reward": _reward,
    "pass_at_k": _pass_at_k,
    "non_finite": _non_finite,
    "teacher_mass": _teacher_mass,
    "sampler_gap": _sampler_gap,
    "stale_sampler": _stale_sampler,
    "no_signal": _no_signal,
}


def _mean(known: Sequence[float]) -> float | None:
    return fmean(known) if known else None
