"""A teacher that spoke in an earlier run: `[teacher] kind = "saved"`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from opdkit.contexts import Context
from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress
from opdkit.engines.states import answered
from opdkit.errors import UserError
from opdkit.recipe.saved import kept_of
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.saved.saved_run import SavedRun
from opdkit.types import Asked, Group, Signal, View


class SavedTeacher(Teacher):
    """What the reader of the view `reader` said in a run. It read what it read then."""

    def __init__(self, run: SavedRun, reader: str, renderer: Renderer) -> None:
        self.renderer = renderer  # of the student; nothing is rendered
        self._run, self._reader = run, reader
        self._step = 0

    @property
    def max_positions(self) -> None:
        return None

    def can_say(self, asked: Asked) -> bool:
        return kept_of(self._run.described, self._reader).covers(asked)

    def before_step(self, step: int) -> None:
        self._step = step

    def views(
        self, groups: Sequence[Group], context: Context, identity: tuple[int | str, ...], number: int, name: str
    ) -> list[View | None]:
        return [self._run.view(self._step, name, rollout) for group in groups for rollout in group.rollouts]

    def score(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        asked: Asked,
        *,
        temperature: float,
        progress: Progress | None = None,
        states_of: Collection[int] = (),
    ) -> list[Signal]:
        """Raises UserError for what it cannot say."""
        signals = [
            self._run.signal(self._step, self._reader, context, answer)
            for context, answer in zip(contexts, answers, strict=True)
        ]
        if progress is not None:
            progress(len(signals), len(signals))
        if all(signal.head is not None for signal in signals):
            said = answered(signals, answers, asked, temperature)
            for row in states_of:
                said[row] = replace(said[row], hidden_TH=signals[row].hidden_TH, head=signals[row].head)
            return said
        kept_at = self._run.temperature(self._step)
        if temperature != kept_at:
            raise UserError(
                f"{self._run.folder.path} kept lists at method.loss_temperature = {kept_at}, and {temperature} needs "
                "whole distributions; keep that temperature, or save a teacher that gives hidden states"
            )
        return [_cut(signal, asked) for signal in signals]


def _cut(signal: Signal, asked: Asked) -> Signal:
    """No more than was asked. Lists are in falling order."""
    if asked.answer == "sampled":
        signal = replace(signal, topk_ids_TK=None, topk_logprob_TK=None)
    elif signal.topk_ids_TK is not None and signal.topk_logprob_TK is not None:
        ids_TK, logprob_TK = signal.topk_ids_TK[:, : asked.k], signal.topk_logprob_TK[:, : asked.k]
        signal = replace(signal, topk_ids_TK=ids_TK, topk_logprob_TK=logprob_TK)
    return signal if asked.entropy else replace(signal, entropy_T=None)
