"""What a recipe asks of its models at each step: who is there, how many rows, how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from opdkit.contexts import Context
from opdkit.contexts.peers import Peers
from opdkit.contexts.reference_solution import ReferenceSolution
from opdkit.cost.size import ModelSize
from opdkit.recipe.model_sections import TeacherSection
from opdkit.recipe.sections import Recipe
from opdkit.types import Asked

PROMPT_TOKENS = 256  # of a problem and its template, where nobody says otherwise
SHOWN_TOKENS = 512  # of a solution, a text or a column that a teacher reads beside it
TOKENS_PER_BATCH = 65536  # as `engines.memory`, which imports torch
BYTES = {"float32": 4, "bfloat16": 2}

# (key in the recipe, path, attn_implementation, trust_remote_code) -> size
SizeOf = Callable[[str, str, str | None, bool], ModelSize]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of an average row. None: answers at their limit, which is the most that they can cost."""

    prompt: int | None = None
    answer: int | None = None
    context: int | None = None  # what a teacher reads besides the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One reading of every row, or of a share of them."""

    context: float  # tokens before the answer
    asked: Asked
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One teacher: what it reads is scored one after another."""

    section: TeacherSection
    size: ModelSize
    dtype: str
    views: tuple[str, ...] = ()
    readings: tuple[Reading, ...] = ()
    is_loaded_first: bool = True  # False: shares a model that another reader has loaded already

    @property
    def is_model(self) -> bool:
        return self.section.kind == "model"

    @property
    def is_elsewhere(self) -> bool:
        """What it says comes from a server or from an earlier run; nothing is computed here."""
        return self.section.kind in ("server", "saved")

    @property
    def gives_states(self) -> int:
        """How many of its readings are answered with hidden states."""
        return sum(reading.asked.answer == "distribution" for reading in self.readings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    recipe: Recipe
    student: ModelSize
    readers: tuple[Reader, ...]
    prompt: float
    answer: float
    longest_prompt: int
    ranks: int = 1
    sharded: bool = False  # its ranks keep the student's layers in parts

    @property
    def rows(self) -> int:
        """Of a step, for each rank."""
        return max(1, -(-self.recipe.train.problems_per_step * self.recipe.sampling.group_size // self.ranks))

    @property
    def row(self) -> float:
        return self.prompt + self.answer

    @property
    def longest(self) -> float:
        return self.longest_prompt + self.answer

    @property
    def dtype(self) -> str:
        return self.recipe.model.dtype

    @property
    def trained(self) -> int:
        """Parameters."""
        lora = self.recipe.model.lora
        return self.student.parameters if lora is None else self.student.adapters(lora.r)

    @property
    def master_bytes(self) -> int:
        """Of a number that is trained, and of its gradient."""
        return 4 if self.recipe.model.lora is not None else BYTES[self.recipe.train.master_dtype]

    @property
    def copies(self) -> int:
        """Bytes of the computation's own copies of float32 weights."""
        is_other = self.recipe.model.lora is None and self.master_bytes != BYTES[self.dtype]
        return BYTES[self.dtype] * self.trained if is_other else 0

    @property
    def kept_share(self) -> float:
        """Of the student's parameters, what a rank keeps."""
        return (1 - self.layers_share) / self.ranks + self.kept_layers if self.sharded else 1 / self.ranks

    @property
    def whole_share(self) -> float:
        """What is whole on a rank in a pass: all, or what is outside the layers, a layer and the next one."""
        share = self.layers_share
        return 1 - share + share * min(1.0, 2 / self.student.layers) if self.sharded else 1.0

    @property
    def kept_layers(self) -> float:
        """Of the student's parameters, a rank's parts of the layers, where they are in parts."""
        return self.layers_share / (self.recipe.parallel.hsdp or self.ranks)

    @property
    def layers_share(self) -> float:
        return self.student.matrices / self.student.parameters

    @property
    def checkpointed(self) -> float:
        """The share of the layers that are run again in the backward pass."""
        some = self.recipe.model.gradient_checkpointing
        return float(some) if isinstance(some, bool) else min(1.0, some / self.student.layers)

    @property
    def pass_name(self) -> str:
        return self.dtype + ("+lora" if self.recipe.model.lora and self.dtype == "bfloat16" else "")

    @property
    def learning_budget(self) -> int:
        """Tokens of a pass that learns."""
        return self.recipe.train.passes("cuda", learning=True).max_tokens

    @property
    def scoring_budget(self) -> int:
        """Tokens of a pass that scores."""
        most = self.recipe.train.passes("cuda", learning=False).max_tokens
        return min(most, self.recipe.sampling.max_tokens_per_batch or most)

    @property
    def learned_at_once(self) -> float:
        """Tokens of the largest micro-batch."""
        return self.tokens_at_once(self.learning_budget, self.row, self.rows / self.recipe.train.updates_per_step)

    def tokens_at_once(self, budget: int, row: float, rows: float) -> float:
        """Of a batch of rows of one length under a budget; a longer row goes alone."""
        return row * max(1, min(rows, budget // max(1, int(row))))


def work_of(recipe: Recipe, size_of: SizeOf, lengths: Lengths, ranks: int = 1) -> Work:
    """Raises UserError where the size of a model is not known."""
    limit, longest_prompt = recipe.longest_answer, recipe.data.max_prompt_tokens
    prompt = float(min(longest_prompt, PROMPT_TOKENS) if lengths.prompt is None else lengths.prompt)
    answer = float(limit if lengths.answer is None else min(lengths.answer, limit))
    model = recipe.model
    student = size_of("model.path", model.path, model.attn_implementation, model.trust_remote_code)
    readers: dict[str, Reader] = {}
    for name, view in recipe.all_views.items():
        key = view.teacher.model_dump_json()
        reader = readers.get(key) or _reader(recipe, name, view.teacher, student, size_of, readers.values())
        # In a route every problem has one of the views: together they read what one would.
        asked = recipe.needs.views.get("teacher" if recipe.route and name in recipe.route.readers else name)
        extra = shown_tokens(view.context, answer, recipe.sampling.group_size)
        extra = extra if lengths.context is None or view.context.kind == "none" else float(lengths.context)
        share = 1 / len(recipe.route.views) if recipe.route and name in recipe.route.readers else 1.0
        new = [] if asked is None else [Reading(context=prompt + extra, asked=asked, share=share)] * view.count
        readers[key] = replace(reader, views=(*reader.views, name), readings=(*reader.readings, *new))
    return Work(
        recipe=recipe,
        student=student,
        readers=tuple(readers.values()),
        prompt=prompt,
        answer=answer,
        longest_prompt=longest_prompt if lengths.prompt is None else int(prompt),
        ranks=ranks,
    )


def _reader(
    recipe: Recipe, view: str, section: TeacherSection, student: ModelSize, size_of: SizeOf, others: Iterable[Reader]
) -> Reader:
    where = "teacher.path" if view == "teacher" else f"views.{view}.teacher.path"

    def key(one: TeacherSection) -> tuple[object, ...]:
        return one.path, one.dtype, one.chat_template, one.trust_remote_code

    size = student
    if section.path is not None and (section.kind != "server" or section.payload == "hidden"):
        size = size_of(where, section.path, recipe.model.attn_implementation, section.trust_remote_code)
    return Reader(
        section=section,
        size=size,
        dtype=section.dtype or recipe.model.dtype,
        is_loaded_first=not any(other.is_model and key(other.section) == key(section) for other in others),
    )


def shown_tokens(context: Context, answer: float, group_size: int) -> float:
    """What a reader of this context reads besides the prompt, about."""
    if context.kind == "none":
        return 0.0
    if isinstance(context, Peers):
        peers = min(len(context.slots), max(1, group_size - 1))
        return peers * min(answer, context.max_tokens_per_peer)
    if isinstance(context, ReferenceSolution):
        return float(min(SHOWN_TOKENS, context.max_solution_tokens))
    return float(SHOWN_TOKENS)
