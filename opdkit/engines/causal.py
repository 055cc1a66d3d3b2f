"""A causal language model as the rest of the package sees it: hidden states at answer positions, a head, stop ids.

`LanguageModel` wraps a Hugging Face module and its tokenizer. Nobody else asks the module for logits: the body is run
here (`hidden`), the head is applied in chunks by `losses.head`, so nothing of size [rows, positions, vocabulary] is
ever formed. Because the head is taken out of the module, how the module turns hidden states into logits (scale,
soft-cap) is read from its config and PROVED by a forward pass when the model is made; a model that would be scored
wrongly is refused.

Rules kept here, so that nobody has to remember them:
- Dropout is off in every pass, whatever mode the module is in. The mode is put back afterwards.
- Masks come from lengths, never from ids, so a padding token that is also the end-of-text token is scored and trained.
- Ids beyond the tokenizer (vocabularies padded to a round number) do not exist.
- Parameters are never changed: other weights (`using`) and adapter-off last for one `with` block.

Letters: B rows, T positions, N answer tokens of all rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from opdkit.contexts.render import Renderer
from opdkit.engines.anatomy import (
    check_parts,
    ids_without_rows,
    logit_transform,
    num_rows,
    text_body,
    unread_parts,
)
from opdkit.engines.forward.packed import Way, num_filled, packed_attention, states, way_of
from opdkit.engines.forward.passes import Passes, passes_on, plan_packed, plan_padded
from opdkit.engines.forward.prefix_tree import grow
from opdkit.engines.offload import kept_on_host
from opdkit.engines.rope import Span, max_length, sides_of_switch, switch_length
from opdkit.engines.stand_ins import Slot, slots, swapped
from opdkit.engines.tokens.stops import find_stops
from opdkit.engines.tokens.vocabulary import num_tokens
from opdkit.errors import UserError
from opdkit.losses import Head

if TYPE_CHECKING:
    from opdkit.engines.shards import Shards

Ids = Sequence[int]
T = TypeVar("T")


class CausalModel:
    """A module, its tokenizer, and what must be known to sample from it, score with it and train it.

    Attributes: `module` (as given, possibly a PEFT wrapper), `tokenizer`, `name` (for messages), `chat_template` (None:
    the tokenizer's own; else "plain" or jinja text, see `contexts.render`), `num_tokens` (ids >= it are neither sampled
    nor scored), `num_readable` (ids >= it have no row), `stop_ids` (any of them ends an answer), `end_id` (closes an
    answer that is written down), `pad_id` (fills unread places), `max_positions` (None: no limit known),
    `switch_length` (see `engines.rope`), `body` (the transformer without its head; call it inside `evaluating`),
    `config`, `warnings` and `notes` (sentences for whoever loads it: what is not read or not there; what is adapted),
    `passes` (how rows are put together, where nobody says otherwise; by default as suits the device), `positions` (what
    passes of `hidden` have read since somebody cleared it: "rows" counts the tokens of all rows,
    "distinct" without repeated beginnings, "computed" with padding).
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        chat_template: str | None = None,
        stop_tokens: Sequence[str | int] | None = None,
    ) -> None:
        """stop_tokens: None, or what ends an answer in place of what `find_stops` finds. Raises UserError if the module
        is no causal language model we can score exactly."""
        self.module = module
        self.tokenizer = tokenizer
        self.name = name or type(module).__name__
        self.chat_template = chat_template
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._base = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.config: Any = self._base.config
        self.body = text_body(self._base, self.name)
        check_parts(self._base, self.body, self.name, getattr(module, "active_peft_config", None))
        generation = getattr(self._base, "generation_config", None)
        stops = find_stops(Renderer(tokenizer, chat_template), generation, stop_tokens, name=self.name)
        self.stop_ids, self.end_id = stops.ids, stops.end
        self._limit_ids()
        self._absent_ids: Tensor | None = None
        self.max_positions = max_length(self.config)
        self.switch_length = switch_length(self.config)
        self._stand_ins: tuple[Slot, ...] = ()
        self.shards: Shards | None = None  # where several ranks keep the layers in parts
        self._checkpointed: tuple[nn.Module, ...] = ()
        self.passes = passes_on(self.device.type)
        self.packs: bool | None = False  # see `is_packed`; None: to be proved
        self.positions: Counter[str] = Counter()
        self._way: Way | None = None  # of the packed pass that is running
        self.offloads_activations = False  # see `evaluating`
        self._replays = False
        self._freeze_unread()
        for embedding in module.modules():
            if isinstance(embedding, nn.Embedding):
                embedding.padding_idx = None  # torch would drop this id's gradient; it may be the end of text

    def renderer(self, **how: Any) -> Renderer:
        """How the model reads and writes: its tokenizer, template and stops, and `how` (the other fields)."""
        return Renderer(self.tokenizer, self.chat_template, stop_ids=self.stop_ids, **how)

    def limit_to(self, end: int, absent: Sequence[int] = ()) -> None:
        """From now on answers are made of ids below `end` that are not `absent`, and compared on them alone.

        Prompts may hold any id below `num_readable`: they are read, not scored.
        """
        self.num_tokens = end
        self._absent_ids = torch.tensor(absent, device=self.device) if absent else None

    @property
    def device(self) -> torch.device:
        return self._head_module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._head_module.weight.dtype

    @property
    def num_rows(self) -> int:
        """Ids that the model's own head gives a logit to."""
        return num_rows(self._base)

    @property
    def absent_ids(self) -> tuple[int, ...]:
        """Ids below `num_tokens` that are not sampled."""
        return () if self._absent_ids is None else tuple(self._absent_ids.tolist())

    @property
    def hidden_width(self) -> int:
        return self._head_module.weight.shape[1]

    def head(self, weights: Mapping[str, Tensor] | None = None) -> Head:
        """Hidden states to logits: weight, bias, vocabulary limit, scale and soft-cap, for `losses.head`.

        The weight is the live parameter (or its stand-in from `weights`), so gradients reach it.
        """
        scale, softcap = logit_transform(self.config)
        if weights is not None and self.shards is not None:
            weights = {name: weights[name] for name in self.head_names if name in weights}
        with self.using(weights):
            head = self._head_module
            bias_V = getattr(head, "bias", None)
            return Head(
                weight_VH=head.weight,
                bias_V=bias_V,
                num_tokens=self.num_tokens,
                absent_ids=self._absent_ids,
                logit_scale=scale,
                softcap=softcap,
            )

    @property
    def head_names(self) -> list[str]:
        """Of the parameters that `head` reads."""
        own = {id(parameter) for parameter in self._head_module.parameters()}
        return [name for name, parameter in self.module.named_parameters() if id(parameter) in own]

    @staticmethod
    def _rows(contexts: Sequence[Ids], answers: Sequence[Ids]) -> list[tuple[int, ...]]:
        """What is read of each row: all but the last answer token, which predicts nothing."""
        if not all(map(len, contexts)):
            raise ValueError("every context needs at least one token: the first answer token is predicted from it")
        return [(*context, *answer[:-1]) for context, answer in zip(contexts, answers, strict=True)]

    def planned(self, contexts: Sequence[Ids], answers: Sequence[Ids], passes: Passes) -> list[list[int]]:
        """Which rows go through `hidden` together."""
        rows = self._rows(contexts, answers)
        return plan_packed(rows, self._own(passes)) if self.is_packed else plan_padded([*map(len, rows)], passes)

    def hidden(
        self,
        contexts: Sequence[Ids],
        answers: Sequence[Ids],
        *,
        weights: Mapping[str, Tensor] | None = None,
        passes: Passes | None = None,
    ) -> Tensor:
        """Hidden states (after the final norm) that predict each answer token: [N, H], rows one after another.

        Token t of an answer is predicted by the state before it, so the first one comes from the last context token.
        Differentiable when gradients are on. All rows go through in one pass; group rows of similar length before.

        Packed (`engines.packed`) where the model is proved to be read so. Else rows are padded on the right and no mask
        is passed: a causal model cannot see what comes later, so this is exact, real tokens have positions 0, 1, 2,
        ..., and attention keeps its fast causal kernel.

        passes: of it, what is worth sharing; None: the model's own. Raises UserError if a row is longer than the
        model's positions.
        """
        rows = self._rows(contexts, answers)
        if not any(map(len, answers)):
            return torch.empty(0, self.hidden_width, dtype=self.dtype, device=self.device)
        lengths = [len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True)]
        self.check_fits(lengths, what="context and answer")
        spans = [Span(row, len(contexts[row]) - 1, len(rows[row])) for row, answer in enumerate(answers) if len(answer)]
        parts = sides_of_switch(spans, self.switch_length)
        is_packed, least = self.is_packed, self._own(passes or self.passes).least_shared
        with self.using(weights), self.evaluating(checkpoint=torch.is_grad_enabled()):
            hidden = [self._read_packed(rows, p, least) if is_packed else self._read(rows, p) for p in parts]
        if len(hidden) == 1:
            return hidden[0]
        place = [(row, position) for part in parts for row, start, end in part for position in range(start, end)]
        order_N = torch.tensor(sorted(range(len(place)), key=place.__getitem__), device=self.device)
        return torch.cat(hidden).index_select(0, order_N)

    def _read(self, rows: Sequence[Ids], spans: Sequence[Span]) -> Tensor:
        """One pass over the beginnings of these rows: the states that the spans ask for, [N, H]."""
        longest = max(end for _, _, end in spans)
        self._count(spans, computed=longest * len(spans), distinct=sum(end for _, _, end in spans))
        where_N = np.concatenate([line * longest + np.arange(start, end) for line, (_, start, end) in enumerate(spans)])
        ids_BT = self.padded([rows[row][:end] for row, _, end in spans], side="right")
        hidden_BTH = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTH.flatten(0, 1).index_select(0, torch.from_numpy(where_N).to(hidden_BTH.device))

    @property
    def is_packed(self) -> bool:
        """Whether `hidden` reads rows in packed passes: only what is proved to be right is (`LanguageModel`)."""
        return bool(self.packs)

    def _read_packed(self, rows: Sequence[Ids], spans: Sequence[Span], least_shared: int | None) -> Tensor:
        """The same in a packed pass."""
        way = way_of(self.body, self.device)
        forest = grow([rows[row][:end] for row, _, end in spans], least_shared)
        where_N = np.concatenate([forest.columns(line)[start:end] for line, (_, start, end) in enumerate(spans)])
        ids_1T = self.padded([[*forest.ids_T.tolist(), *[self.pad_id] * num_filled(forest, way)]], side="right")
        self._count(spans, computed=ids_1T.numel(), distinct=len(forest.ids_T))
        before, self._way = self._way, way
        try:
            states_TH = states(self.body, ids_1T, forest, way)
        finally:
            self._way = before
        return states_TH.index_select(0, torch.from_numpy(where_N).to(states_TH.device))

    def _own(self, passes: Passes) -> Passes:
        """Flash attention has no trees."""
        return replace(passes, least_shared=None) if way_of(self.body, self.device) == "varlen" else passes

    def _count(self, spans: Sequence[Span], *, computed: int, distinct: int) -> None:
        self.positions.update(rows=sum(end for _, _, end in spans), distinct=distinct, computed=computed)

    def padded(self, rows: Sequence[Ids], *, side: Literal["left", "right"]) -> Tensor:
        """[B, T] ids of ragged rows on the model's device, filled up with `pad_id`. Ids must be the tokenizer's."""
        longest = max(map(len, rows))
        ids_BT = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        for row, ids in enumerate(rows):
            start = longest - len(ids) if side == "left" else 0
            ids_BT[row, start : start + len(ids)] = ids
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if high in self._without_rows:
            raise UserError(
                f"a text holds {self._without_rows[high]!r} (id {high}), for which {self.name} has no embedding "
                f"(it has {self.num_readable} rows); remove it from the data, or use a model that knows it."
            )
        if not 0 <= low <= high < self.num_readable:
            raise ValueError(f"ids from {low} to {high}, but the tokenizer has {self.num_readable} tokens")
        return torch.from_numpy(ids_BT).to(self.device)

    @contextmanager
    def using(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Inside the block, the parameters named in `weights` (names of `module.named_parameters()`) are these tensors.

        Not `torch.func.functional_call`: with activation checkpointing the layers run a second time in the backward
        pass, after functional_call has put the old tensors back; here the second run gets the same stand-ins.
        Gradients flow into the stand-ins (for instance bf16 copies of fp32 master weights). Of layers that are kept in
        parts they are this rank's parts, and nothing flows into them.
        """
        if weights is None:
            yield
            return
        in_parts = {} if self.shards is None else {n: w for n, w in weights.items() if n in self.shards}
        stand_ins = slots(self.module, {n: w for n, w in weights.items() if n not in in_parts})
        before, self._stand_ins = self._stand_ins, stand_ins
        try:
            with swapped(stand_ins), nullcontext() if self.shards is None else self.shards.holding(in_parts):
                yield
        finally:
            self._stand_ins = before

    def in_step(
        self, plans: Sequence[T], weights: Callable[[], Mapping[str, Tensor] | None] = lambda: None
    ) -> Iterator[T]:
        """The plans of passes in turn. Of a model whose layers are in parts all ranks make equally many, so behind the
        last one come passes over nothing, with a backward pass of zeros where gradients are on."""
        missing = 0 if self.shards is None else self.shards.most(len(plans)) - len(plans)
        yield from plans
        for _ in range(missing):
            with self.using(weights()), self.evaluating(checkpoint=torch.is_grad_enabled()):
                hidden = self.body(input_ids=self.padded([[self.pad_id]], side="right"), use_cache=False)
            if torch.is_grad_enabled():
                (hidden.last_hidden_state.sum() * 0).backward()

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside the block a LoRA student is its base model. Raises UserError if the module has no adapter."""
        if not hasattr(self.module, "disable_adapter"):
            raise UserError(
                f"{self.name} has no adapter to switch off; train with LoRA or use an initial-weights teacher."
            )
        with self.module.disable_adapter():
            yield

    @contextmanager
    def evaluating(self, *, checkpoint: bool = False) -> Iterator[None]:
        """Inside the block dropout is off everywhere; `checkpoint` lets checkpointed layers do their work, and, where
        the model `offloads_activations`, what is kept for the backward pass go to host memory."""
        if checkpoint and self.offloads_activations and not self._replays:
            with kept_on_host(self.module), self._without_dropout(self._checkpointed):
                yield
        else:
            with self._without_dropout(self._checkpointed if checkpoint else ()):
                yield

    @contextmanager
    def _without_dropout(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        if not layers and not self.module.training:
            yield
            return
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        for layer in layers:
            layer.training = True  # transformers asks this flag, of this module alone, whether to checkpoint
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def check_fits(self, lengths: Sequence[int], what: str) -> None:
        """Raise UserError naming the first row whose number of tokens exceeds the model's positions."""
        if self.max_positions is None:
            return
        for row, length in enumerate(lengths):
            if length > self.max_positions:
                raise UserError(
                    f"row {row} needs {length} positions ({what}), but {self.name} has {self.max_positions}; "
                    "shorten the prompt, lower max_answer_tokens, or use a model with a longer context."
                )

    def _limit_ids(self) -> None:
        """Ids that exist are the tokenizer's that have rows. Raises UserError where no answer could end any more."""
        rows, vocabulary = num_rows(self._base), num_tokens(self.tokenizer)
        self.num_tokens = self.num_readable = min(rows, vocabulary)
        self._without_rows = dict(ids_without_rows(self.tokenizer, rows, self.name))
        if self._without_rows:
            first, token = next(iter(self._without_rows.items()))
            self.warnings.append(
                f"{self.name} has {rows} rows and its tokenizer {len(self._without_rows)} added tokens beyond them "
                f"(first: {token!r}, id {first}); they are never sampled, and a text that holds one is refused"
            )
        if min(self.stop_ids) >= self.num_tokens:
            raise UserError(
                f"{self.name} has {rows} rows, none of them for a stop token (ids {sorted(self.stop_ids)}), so no "
                "answer could ever end; resize its embeddings, or set another eos_token."
            )
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = min(self.stop_ids) if pad_id is None or pad_id >= self.num_tokens else pad_id

    def _freeze_unread(self) -> None:
        parts = unread_parts(self._base, self.body)
        for part in parts.values():
            part.requires_grad_(False)
        if parts:
            size = sum(parameter.numel() for part in parts.values() for parameter in part.parameters())
            names = ", ".join(list(parts)[:3]) + (", ..." if len(parts) > 3 else "")
            self.warnings.append(
                f"{self.name} is a {type(self._base).__name__}: only its text model is read and trained; {size:,} "
                f"parameters beside it ({names}) stay as they are"
            )

    @property
    def _head_module(self) -> Any:
        return self._base.get_output_embeddings()

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._second_run(self._stand_ins, self._way)

    @contextmanager
    def _second_run(self, stand_ins: tuple[Slot, ...], way: Way | None) -> Iterator[None]:
        before, self._replays = self._replays, True
        try:
            with swapped(stand_ins), self.evaluating(checkpoint=True), packed_attention(self.body, way):
                yield
        finally:
            self._replays = before
