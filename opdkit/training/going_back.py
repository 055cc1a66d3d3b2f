"""A run that goes wrong goes back: to the last checkpoint before it did, and on from there with a lower learning rate.

What happens then is what `--resume` does from that checkpoint: models are loaded anew, later rows, evaluations and
checkpoints are removed. metrics.jsonl keeps the lines of the steps that are taken again (`metric_lines`). The
checkpoint is written again with the number of the try and the learning rate, so that a run which is killed afterwards
goes on with them; one that is killed before comes to the same decision again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opdkit.run.folder import RunFolder
from opdkit.run.sentinels import Verdict
from opdkit.training.saved import checkpoint
from opdkit.training.state import State


@dataclass
class GoBack(Exception):
    """Raised behind a step whose metrics are written; all ranks raise the same."""

    step: int  # that was taken
    before: int  # the first step of which the metrics were wrong
    why: str
    attempt: int  # that comes
    lr_factor: float  # likewise
    counters: Mapping[str, float]  # of all that was done: what is repeated was paid for

    @classmethod
    def of(cls, verdict: Verdict, state: State, lr_factor: float) -> GoBack:
        """lr_factor: of this time."""
        return cls(
            step=state.step,
            before=min(one.since for one in verdict.because),
            why=verdict.why,
            attempt=state.attempt + 1,
            lr_factor=state.optimizer.lr_factor * lr_factor,
            counters=dict(state.counters),
        )

    def saved(self, folder: RunFolder) -> checkpoint.Saved | None:
        """What the run goes on from, None: from its start. Removes the checkpoints behind it."""
        return checkpoint.before(folder.checkpoints, self.before)

    def begin(self, state: State) -> None:
        """Of a run that is back at an earlier step."""
        state.attempt, state.optimizer.lr_factor = self.attempt, self.lr_factor
        state.counters = {**self.counters}
        for name, more in (("rollbacks", 1), ("steps_rolled_back", self.step - state.step)):
            state.counters[name] = state.counters.get(name, 0.0) + more

    def sentence(self, step: int) -> str:
        where = f"the checkpoint of step {step}" if step else "the start"
        return (
            f"step {self.step}: {self.why}; went back to {where}, and on with {self.lr_factor:g} times the learning "
            f"rate (attempt {self.attempt})"
        )
