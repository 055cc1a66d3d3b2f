"""What a run asks of whoever scores, wherever that one's weights are: in this process, at a server, in a saved run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from opdkit.contexts import Context, build_views
from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress, Sampler
from opdkit.engines.model import LanguageModel
from opdkit.losses import Head
from opdkit.metrics import Metric
from opdkit.training.models.optimizer import check_tensors
from opdkit.types import Asked, Group, Signal, Spans, SpanSpread, View


class Teacher:
    """renderer: how it reads and writes."""

    renderer: Renderer
    spread: SpanSpread | None = None  # of a teacher with another tokenizer, see `Spans`

    @property
    def loaded_model(self) -> LanguageModel | None:
        """What it has in this process, once that is loaded."""
        return None

    @property
    def max_positions(self) -> int | None:
        """Longer readings are not scored, and counted. None: no limit known."""
        raise NotImplementedError

    def fits(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> bool:
        """Whether it can read the answer behind the context."""
        room = self.max_positions
        return room is None or len(context_ids) + len(answer_ids) <= room

    def spans_of(self, context_ids: Sequence[int], answer_ids: Sequence[int], asked: Asked) -> Spans | None:
        """Which tokens a teacher with another tokenizer can say something of; None: it reads these very tokens."""
        return None

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
        """As `engines.base.Scorer`. states_of: rows whose hidden states and head come too, from whoever can say them,
        whatever is asked."""
        raise NotImplementedError

    def can_say(self, asked: Asked) -> bool:
        """Whether it can answer this at all."""
        return True

    def views(
        self, groups: Sequence[Group], context: Context, identity: tuple[int | str, ...], number: int, name: str
    ) -> list[View | None]:
        """What is read for every rollout, in order; None: nothing. name: of this reading, the view's `number`-th."""
        return build_views(groups, context, self.renderer, identity, number)

    def engine(self) -> Sampler:
        """With the weights of this moment; to be used inside `active`."""
        raise AssertionError(f"a {type(self).__name__} scores, and no engine samples from it")

    def active(self) -> AbstractContextManager[None]:
        """Inside the block `engine` is the teacher, and where it has to be."""
        return nullcontext()

    def head(self) -> Head:
        """That its hidden states go through, of this moment."""
        raise AssertionError(f"a {type(self).__name__} has no head")

    def load(self) -> None:
        """Now, not when it is first asked."""

    @property
    def warnings(self) -> Sequence[str]:
        """What loading it found."""
        return ()

    def before_step(self, step: int) -> None:
        """Called before anything is asked in the step behind `step` others."""

    def after_step(self) -> None:
        """Called after every optimizer step that was applied."""

    def metrics(self) -> list[Metric]:
        """What its answers cost since the last call."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError unless `state` has exactly the tensors that this teacher saves."""
        check_tensors("teacher", state, {})

    def close(self) -> None:
        """Let go of what it holds outside this process."""
