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
from opdkit.training.saved import checkpoint


@dataclass
class GoBack(Exception):
    """Raised behind a step whose metrics are written; all ranks raise the same."""

    step: int  # that was taken
    before: int  # the first step of which the metrics were wrong
    why: str
    attempt: int  # that comes
    lr_factor: float  # likewise
    counters: Mapping[str, float]  # of all that was done: what is repeated was paid for

    def saved(self, folder: RunFolder) -> checkpoint.Saved | None:
        """What the run goes on from, None: from its start. Removes the checkpoints behind it."""
        return checkpoint.before(folder.checkpoints, self.before)

    def counted(self, step: int) -> dict[str, float]:
        """The counters of a run that is back at `step`."""
        back = self.counters.get("rollbacks", 0.0), self.counters.get("steps_rolled_back", 0.0)
        return {**self.counters, "rollbacks": back[0] + 1, "steps_rolled_back": back[1] + self.step - step}

    def sentence(self, step: int) -> str:
        where = f"the checkpoint of step {step}" if step else "the start"
        return (
            f"step {self.step}: {self.why}; went back to {where}, and on with {self.lr_factor:g} times the learning "
            f"rate (attempt {self.attempt})"
        )
