"""The checkpoints of a run while it lasts: what is written into them, what is read back, and which are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opdkit.engines.memory import enough_memory
from opdkit.ranks.base import Ranks
from opdkit.recipe import Recipe
from opdkit.run.folder import RunFolder
from opdkit.run.history import Point
from opdkit.run.sums import note_so_far
from opdkit.training.ahead import Ahead
from opdkit.training.models.viewers import state_of
from opdkit.training.parts import Parts
from opdkit.training.saved import checkpoint
from opdkit.training.state import State

LESS_TO_KEEP = (
    "lower train.problems_per_step, sampling.group_size or sampling.max_answer_tokens, and see docs/start/gpu.md for "
    "what each setting keeps"
)


@dataclass(slots=True)
class Keeper:
    recipe: Recipe
    parts: Parts
    state: State
    folder: RunFolder
    ahead: Ahead | None
    ranks: Ranks
    saved_step: int = field(init=False, default=0)  # the newest that needs no saving
    _whole: Callable[[], None] | None = field(init=False, default=None)  # of the one that is on its way
    best_step: int | None = field(init=False, default=None)  # whose checkpoint is kept, too

    def restore(self, saved: checkpoint.Saved) -> None:
        """What a checkpoint has besides what `Parts` loaded of it."""
        state = self.state
        state.step = self.saved_step = saved.step
        state.attempt, self.parts.optimizer.lr_factor = saved.attempt, saved.lr_factor
        state.counters.update(saved.counters)
        state.pass_rates.update(saved.pass_rates)
        if self.ahead is not None:
            self.ahead.restore(saved.queue())

    def keep_best(self, best: Point | None) -> None:
        """best: the evaluation that is chosen so far, of this step or an earlier one."""
        self.best_step = None if best is None else best.step
        if self.best_step == self.state.step:
            self.save_what_is_new()

    def remove_left_over(self) -> None:
        """What a crash left between the writing of one and the removal of another. The best one must be known."""
        if self.ranks.is_first:
            checkpoint.remove_older(self.folder.checkpoints, self.recipe.train.keep_checkpoints, self._is_kept)

    def save_what_is_new(self) -> None:
        if self.state.step > self.saved_step:
            self.save()

    def save(self) -> None:
        """It may be on its way then, see `wait`."""
        parts, state = self.parts, self.state
        self.wait()
        with enough_memory("writing a checkpoint", LESS_TO_KEEP):
            self._whole = checkpoint.save(
                self.folder.checkpoints,
                step=state.step,
                model=parts.student,
                weights=parts.optimizer.for_saving(),
                optimizer=parts.optimizer.to_save(parts.optimizer.state()),
                teacher=parts.optimizer.to_save(state_of(parts.viewers)),
                counters=state.counters,
                pass_rates=state.pass_rates,
                keep=self.recipe.train.keep_checkpoints,
                also_kept=self._is_kept,
                attempt=state.attempt,
                lr_factor=parts.optimizer.lr_factor,
                ranks=self.ranks,
                queue=None if self.ahead is None else self.ahead.waiting(state.step),
                in_background=self.recipe.train.save_in_background,
            )
        self.ranks.from_first(lambda: note_so_far(self.folder.metrics))
        self.saved_step = state.step

    def wait(self) -> None:
        """Until the last checkpoint is whole. Called by all ranks; raises UserError where it could not be written."""
        whole, self._whole = self._whole, None
        if whole is not None:
            whole()

    def _is_kept(self, step: int) -> bool:
        """The best one, and those that the run may want to go back to: sentinels look at the last window of steps."""
        if step == self.best_step:
            return True
        if self.recipe.sentinels.action != "rollback":
            return False
        trusted = self.state.step - self.recipe.sentinels.window
        return step >= max((s for s in checkpoint.steps(self.folder.checkpoints) if s <= trusted), default=0)
