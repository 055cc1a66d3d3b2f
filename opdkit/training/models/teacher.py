"""Who scores. A teacher is an engine, a chat template and (for exact distributions) a head.

Self-teachers share the student's module and differ in its weights, which are put in for the length of a call and never
written into it: `initial` (as training began), `ema` (float32, in every checkpoint), `live`, `adapter_off` (LoRA: the
base model), `trust_region` (initial and live logits mixed). Any other model comes by path, with its own chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime

import torch
from torch import Tensor

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress
from opdkit.engines.forward.scoring import signals_of
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.losses.heads import mixed_head
from opdkit.recipe import Recipe, TeacherSection
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.optimizer import Optimizer, check_tensors
from opdkit.training.models.other_models import OtherModel
from opdkit.training.models.side import teacher_reading
from opdkit.types import Asked, Signal

# Of the moment, all of them or those of these names, where the student is; None: the module's own.
Weights = Callable[[Collection[str] | None], Mapping[str, Tensor] | None]
_HIDDEN_STATES = Asked("distribution")


class ModelTeacher(Teacher):
    """A model in this process: the student's own module, or another."""

    def __init__(
        self,
        model: LanguageModel | OtherModel,
        renderer: Renderer,
        *,
        max_tokens_per_batch: int | None,
        weights: Weights = lambda names: None,
        adapter_off: bool = False,
    ) -> None:
        self._whose = model
        self.renderer = renderer
        self._weights = weights
        self._adapter_off = adapter_off
        self._max_tokens = max_tokens_per_batch
        self._head_at_home: Head | None = None  # another model's, where the student is on another device

    @property
    def model(self) -> LanguageModel:
        """Another model is loaded when it is first asked for."""
        return self._whose() if isinstance(self._whose, OtherModel) else self._whose

    @property
    def loaded_model(self) -> LanguageModel | None:
        return self._whose.loaded if isinstance(self._whose, OtherModel) else self._whose

    @property
    def max_positions(self) -> int | None:
        if not isinstance(self._whose, OtherModel) or not self._whose.moves:
            return self.model.max_positions
        self.load()
        return self._whose.max_positions

    @property
    def warnings(self) -> Sequence[str]:
        return self._whose.warnings

    def load(self) -> None:
        if isinstance(self._whose, OtherModel) and not self._whose.was_loaded:
            with self._whose.at_work():
                pass

    def engine(self) -> HFEngine:
        """An engine with the teacher's weights of this moment."""
        return HFEngine(self.model, max_tokens_per_batch=self._max_tokens, weights=self._weights(None))

    def active(self) -> AbstractContextManager[None]:
        """Inside the block the engine is the teacher (a LoRA student's adapter is off), and another model is there."""
        if isinstance(self._whose, OtherModel):
            return self._whose.at_work()
        return self._whose.adapter_off() if self._adapter_off else nullcontext()

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
        with self.active():
            engine = self.engine()
            signals = engine.score(
                contexts, answers, asked, temperature=temperature, progress=progress, states_of=states_of
            )
            return self._as_kept(signals)

    def _as_kept(self, signals: list[Signal]) -> list[Signal]:
        """What was said, in a form that still holds when the student has moved, or the model has gone; with the head
        where the student is."""
        if not isinstance(self._whose, OtherModel):
            return signals
        heads = {id(signal.head): self._at_home(signal.head) for signal in signals if signal.head is not None}
        return [s if s.head is None else replace(s, head=heads[id(s.head)]) for s in signals]

    def head(self) -> Head:
        with self.active():
            return self._at_home(self.model.head(self._weights(self.model.head_names)))

    def _at_home(self, head: Head) -> Head:
        """Another model's, that stays while the model goes, where the student is; it does not change, so once."""
        if not isinstance(self._whose, OtherModel):
            return head
        if head.weight_VH.device == self._whose.home:
            return _held(head) if self._whose.moves else head
        if self._head_at_home is None:
            self._head_at_home = head_on(_held(head), self._whose.home)
        return self._head_at_home


class LiveTeacher(ModelTeacher):
    """The student itself, of the moment it is asked."""

    def __init__(
        self,
        model: LanguageModel,
        renderer: Renderer,
        optimizer: Optimizer,
        max_tokens: int | None,
        *,
        several_updates: bool,
    ) -> None:
        self._copies_head = several_updates
        super().__init__(model, renderer, max_tokens_per_batch=max_tokens, weights=_live(optimizer))

    def _as_kept(self, signals: list[Signal]) -> list[Signal]:
        own = next((signal.head for signal in signals if signal.head is not None), None)
        if not self._copies_head or own is None:
            return signals
        head = _copy(own)  # the first update of the step moves the student's own in place
        return [signal if signal.head is None else replace(signal, head=head) for signal in signals]


class InitialTeacher(ModelTeacher):
    """The student as it was before the first step. In checkpoints: after a resume the module holds others.

    on_host: the weights are kept in host memory, and are where the student is while it reads.
    """

    def __init__(
        self,
        model: LanguageModel,
        renderer: Renderer,
        optimizer: Optimizer,
        max_tokens: int | None,
        *,
        on_host: bool = False,
    ) -> None:
        self._optimizer = optimizer
        # One after another: a second set of all of them may not fit.
        self._kept = {name: _kept(optimizer.as_read(w.detach()), on_host) for name, w in optimizer.weights.items()}
        super().__init__(
            model,
            renderer,
            max_tokens_per_batch=max_tokens,
            weights=lambda names: optimizer.stand_ins(_brought(self._kept, names, model.device)),
        )

    def state(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_tensors("teacher", state, _shapes(self._kept))
        self._kept |= {name: tensor.to(self._kept[name].device) for name, tensor in state.items()}


class EMATeacher(ModelTeacher):
    """teacher += rate * (student - teacher) after every applied step, in float32 whatever the computation reads.

    Mean teacher (arXiv:1703.01780); SDPO and MOPD use rate 0.05. In bfloat16 the increments would be rounded away.
    on_host: the average is kept and moved in host memory, and is where the student is while it reads.
    """

    def __init__(
        self,
        model: LanguageModel,
        renderer: Renderer,
        optimizer: Optimizer,
        max_tokens: int | None,
        *,
        rate: float,
        on_host: bool = False,
    ) -> None:
        self.rate = rate
        self._optimizer = optimizer
        self.average = {name: _kept(_at_least_float32(w), on_host) for name, w in optimizer.weights.items()}
        super().__init__(model, renderer, max_tokens_per_batch=max_tokens, weights=self._as_computed)

    def after_step(self) -> None:
        for name, weight in self._optimizer.weights.items():
            average = self.average[name]
            average.lerp_(weight.detach().to(average.device, average.dtype), self.rate)

    def state(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_tensors("teacher", state, _shapes(self.average))
        self.average |= {name: tensor.to(self.average[name].device) for name, tensor in state.items()}

    def _as_computed(self, names: Collection[str] | None) -> Mapping[str, Tensor]:
        rule = self._optimizer
        wanted = self.average if names is None else {n: w for n, w in self.average.items() if n in names}
        # Rounded first: half as much is brought.
        read = {name: rule.as_read(weight) for name, weight in wanted.items()}
        return rule.stand_ins(_brought(read, None, self.model.device))


class TrustRegionTeacher(ModelTeacher):
    """logits = (1 - share) initial + share live, both reading the teacher's context; the live part is held constant.

    SDPO's trust region (arXiv:2601.20802). A mixture of logits is the logits of one head, over the two hidden states
    side by side, so every loss can ask it whatever it could ask a model. It reads each row twice, keeps twice the
    hidden states and a copy of both heads while a batch is learned, and cannot sample.
    Raises UserError for a student that soft-caps its logits: the mixture is then no head's.
    """

    def __init__(
        self,
        model: LanguageModel,
        renderer: Renderer,
        optimizer: Optimizer,
        max_tokens: int | None,
        *,
        student_share: float,
        on_host: bool = False,
    ) -> None:
        if model.head().softcap is not None:
            raise UserError(
                f'teacher.weights = "trust_region" mixes logits, but {model.name} soft-caps them, and no head gives '
                'such a mixture; use teacher.weights = "ema"'
            )
        self.student_share = student_share
        self.initial = InitialTeacher(model, renderer, optimizer, max_tokens, on_host=on_host)
        self.live = LiveTeacher(model, renderer, optimizer, max_tokens, several_updates=False)  # mixing copies
        super().__init__(model, renderer, max_tokens_per_batch=max_tokens)

    def engine(self) -> HFEngine:
        raise AssertionError("a mixture of logits scores; no engine samples from it")

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
        both = [
            teacher.score(contexts, answers, _HIDDEN_STATES, temperature=temperature, progress=progress)
            for teacher in (self.initial, self.live)
        ]
        if not answers:
            return []
        head, signals = mixed_head(both[0][0].head, both[1][0].head, self.student_share), []
        for row, (initial, live, answer) in enumerate(zip(*both, answers, strict=True)):
            assert initial.hidden_TH is not None and live.hidden_TH is not None
            hidden_TH = torch.cat([initial.hidden_TH, live.hidden_TH], -1)
            (signal,) = signals_of(hidden_TH, head, [answer], asked, temperature)
            signals.append(replace(signal, hidden_TH=hidden_TH, head=head) if row in states_of else signal)
        return signals

    def head(self) -> Head:
        return mixed_head(self.initial.head(), self.live.head(), self.student_share)

    def state(self) -> dict[str, Tensor]:
        return self.initial.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.initial.load_state(state)


def make_teacher(
    recipe: Recipe,
    section: TeacherSection,
    student: LanguageModel,
    optimizer: Optimizer,
    now: datetime | None = None,
    other: OtherModel | None = None,
) -> Teacher:
    """Who a section names. now: the date that its template prints, if it does; other: the model of a section with a
    path, which is not loaded here.

    Raises UserError for a teacher that cannot be compared.
    """
    max_tokens = recipe.sampling.max_tokens_per_batch
    model: LanguageModel | OtherModel = student
    if section.kind == "model":
        model = other or OtherModel(recipe, section, student)
    own = model.renderer(**teacher_reading(recipe, section, model.renderer(), now))
    if isinstance(model, OtherModel):
        return ModelTeacher(model, own, max_tokens_per_batch=max_tokens)
    on_host = section.weights_on == "host"
    if section.weights == "initial":
        return InitialTeacher(student, own, optimizer, max_tokens, on_host=on_host)
    if section.weights == "ema":
        assert section.ema_rate is not None
        return EMATeacher(student, own, optimizer, max_tokens, rate=section.ema_rate, on_host=on_host)
    if section.weights == "trust_region":
        assert section.student_share is not None
        return TrustRegionTeacher(
            student, own, optimizer, max_tokens, student_share=section.student_share, on_host=on_host
        )
    if section.weights == "adapter_off":
        return ModelTeacher(student, own, max_tokens_per_batch=max_tokens, adapter_off=True)
    return LiveTeacher(student, own, optimizer, max_tokens, several_updates=recipe.train.updates_per_step > 1)


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _kept(weight: Tensor, on_host: bool) -> Tensor:
    """A copy; on the host in memory that a card copies from while it computes."""
    if not on_host or weight.device.type == "cpu":
        return weight.clone()
    return weight.to("cpu").pin_memory()


def _brought(weights: Mapping[str, Tensor], names: Collection[str] | None, device: torch.device) -> dict[str, Tensor]:
    return {n: w.to(device, non_blocking=True) for n, w in weights.items() if names is None or n in names}


def head_on(head: Head, device: torch.device) -> Head:
    """The head for states on this device."""
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    absent_ids = None if head.absent_ids is None else head.absent_ids.to(device)
    return replace(head, weight_VH=head.weight_VH.to(device), bias_V=bias_V, absent_ids=absent_ids)


def _held(head: Head) -> Head:
    """The same numbers, which stay on the device when the module leaves it."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return replace(head, weight_VH=head.weight_VH.detach(), bias_V=bias_V)


def _copy(head: Head) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.detach().clone()
    return replace(head, weight_VH=head.weight_VH.detach().clone(), bias_V=bias_V)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of several ranks, some may have no part of a weight, and a checkpoint gives them none."""
    return {name: tuple(weight.shape) for name, weight in weights.items() if weight.numel()}


def _live(optimizer: Optimizer) -> Weights:
    """The student's weights of the moment, as the computation reads them; None where they are the module's own."""

    def weights(names: Collection[str] | None) -> Mapping[str, Tensor] | None:
        read = optimizer.compute_weights(names)
        return None if read is None else {name: weight.detach() for name, weight in read.items()}

    return weights
