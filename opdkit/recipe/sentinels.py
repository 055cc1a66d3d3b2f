"""The recipe's [sentinels]: by what numbers a run that goes wrong is known, and what is done then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from opdkit.recipe.fields import Count, PositiveInt, Section, exists_in

Above = Annotated[float, Field(gt=0)] | Literal[False]
Share = Annotated[float, Field(gt=0, le=1)] | Literal[False]
Ratio = Annotated[float, Field(gt=1)] | Literal[False]

# Name -> whether a lower learning rate can mend it, so that going back to a checkpoint helps.
SENTINELS = {
    "length": True,
    "repetition": True,
    "unending": True,
    "entropy": True,
    "reward": True,
    "pass_at_k": True,
    "non_finite": True,
    "teacher_mass": True,
    "sampler_gap": False,
    "stale_sampler": False,
    "no_signal": False,
}


class SentinelsSection(Section):
    """What is compared with these limits are means over `window` steps: now, and at the beginning of the run. A limit
    that is false is not watched. docs/guides/sentinels.md."""

    # When one finds something: say it; save, stop, and wait for --resume; go back to the last checkpoint before it and
    # go on from there with a lower learning rate; or save, evaluate and end the run.
    action: Literal["warn", "pause", "rollback", "stop"] = "warn"
    # The sentinels that do so; the others only warn. Default: all, but for rollback those that no learning rate mends
    # (sampler_gap, stale_sampler, no_signal).
    acting: Annotated[tuple[Annotated[str, exists_in(SENTINELS)], ...], Field(strict=False)] | None = None
    window: PositiveInt = 10  # steps; a run of less than two windows is watched by those alone that need one step
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5  # action = "rollback": of the learning rate, each time
    max_rollbacks: Count = 3  # action = "rollback": the next one stops the run
    # Answers are so many times as long as at the beginning, or as short. Lengths inflate abruptly before on-policy
    # distillation breaks down (arXiv:2604.08527); the factor is ours.
    length: Ratio = 3.0
    # The share of answers that end in a loop (`measure/repetition.py`) has risen by so much: repetition saturates as
    # lengths inflate (arXiv:2604.08527); the number is ours.
    repetition: Share = 0.2
    # The share of answers that are cut at the limit has risen by so much: cut answers come to dominate the data
    # (arXiv:2604.08527), also where student and teacher end a turn with other tokens; the number is ours.
    unending: Share = 0.3
    # The student's entropy is below this share of what it was: exploration is spent (arXiv:2505.22617). A student that
    # learns from a surer teacher falls too, so the share is low; the number is ours.
    entropy: Share = 0.05
    # The reward is so far below its best window, and by more than three standard errors, while the loss is lower than
    # there: what is learned is no longer what is wanted (overoptimisation, arXiv:2210.10760). The number is ours.
    reward: Above = 0.1
    # pass@k of the largest k of an evaluation is so far below the first one, and their intervals are apart: answers
    # become sure and alike (arXiv:2504.13837). The number is ours.
    pass_at_k: Share = 0.05
    # So many steps in a row whose loss or gradient is not finite. Such a step changes nothing; the next may.
    non_finite: PositiveInt | Literal[False] = 1
    # What the teacher gives the tokens that both find likely has fallen by so much: in runs that succeed it stays at
    # 0.97 to 0.99 (arXiv:2604.13016). Compared every diagnostics.every steps; the number is ours.
    teacher_mass: Share = 0.1
    # Nats by which the sampler's log-probs differ from the trainer's, in the mean. Default: float32 0.001, bfloat16
    # 0.02, some times what rounding does (docs/reference/run_folder.md).
    sampler_gap: Above | None = None
    # Likewise, at the 99.9th percentile. Default: float32 0.05, bfloat16 0.5.
    sampler_gap_p999: Above | None = None
    # The effective share of the sample is below this: answers are too old for this student (Kish 1965 for the
    # number; the limit is ours).
    stale_sampler: Share = 0.5
    # So many groups have one reward alone, and teach a method nothing that compares rewards: what DAPO samples anew
    # (arXiv:2503.14476). The number is ours.
    no_signal: Share = 0.9

    @property
    def acts(self) -> frozenset[str]:
        """The names of those whose findings are acted upon."""
        if self.action == "warn":
            return frozenset()
        if self.acting is not None:
            return frozenset(self.acting)
        return frozenset(name for name, is_mended in SENTINELS.items() if is_mended or self.action != "rollback")


def sentinel_faults(section: SentinelsSection, save_every: int) -> Iterator[str]:
    """What the section asks for and the run cannot do."""
    if section.action != "rollback":
        return
    if hopeless := [name for name in section.acting or () if not SENTINELS[name]]:
        yield (
            f'sentinels.action = "rollback" lowers the learning rate, which does not mend {", ".join(hopeless)} of '
            'sentinels.acting; leave it out, or use action = "pause" or "stop"'
        )
    if not save_every:
        yield (
            'sentinels.action = "rollback" goes back to a checkpoint, and train.save_every = 0 writes none before the '
            "end; set it, e.g. to 50"
        )


def sentinel_warnings(section: SentinelsSection, steps: int) -> Iterator[str]:
    """What somebody counts on and does not get."""
    if section.acts and steps < 2 * section.window:
        yield (
            f'sentinels.action = "{section.action}" acts on trends over sentinels.window = {section.window} steps from '
            f"the second window on, and train.steps = {steps} are fewer than two; lower sentinels.window"
        )
