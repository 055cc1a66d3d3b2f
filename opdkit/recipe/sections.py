"""The keys of a recipe: one class a section, with defaults and reasons. A wrong type or an unknown key is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny

from opdkit.contexts import Context
from opdkit.contexts.none import NoContext
from opdkit.data.schemas.schema import COLUMNS
from opdkit.engines.base import SamplingParams
from opdkit.methods.base import Method
from opdkit.methods.weighting import Weights
from opdkit.metrics import SINKS
from opdkit.recipe.points import Points
from opdkit.tasks.options import ChosenTask, resolve_task
from opdkit.types import Needs

MOST = 2**31 - 1  # what every index of an array can count
MANY = 2**16  # answers to one problem
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Answers = Annotated[int, Field(gt=0, le=MANY)]
Words = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML's arrays arrive as lists

StopTokens = Annotated[tuple[str | int, ...], Field(strict=False, min_length=1)]


def _exists_in(table: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"does not exist{did_you_mean(name, table)}")
        return name

    return AfterValidator(check)


def _roles(columns: Mapping[str, str | tuple[str, ...]]) -> Mapping[str, str | tuple[str, ...]]:
    for role in columns:
        if role not in COLUMNS:
            raise ValueError(f"{role} is no role of a column{did_you_mean(role, COLUMNS)}")
    return columns


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LoraSection(Section):
    """No dropout: the policy that samples must be the policy that is trained."""

    r: PositiveInt = 64
    alpha: PositiveInt = 128
    target_modules: str | Strings = "all-linear"


class ModelSection(Section):
    """The student."""

    path: Words  # a folder in Hugging Face format, or a hub id
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; what is trained is kept in float32
    device: Words = "auto"
    chat_template: str | None = None  # a jinja file, or "plain", for tokenizers that have none
    template_kwargs: Mapping[str, Any] = {}  # passed to the chat template, e.g. { enable_thinking = false }
    close_thinking: bool = False  # where the template opens <think> in every prompt (R1, Olmo-Think), close it again
    system: str | None = None  # a system prompt, in place of the data's own
    # What ends an answer, as tokens or ids. Default: the chat template's end of turn, the tokenizer's end of text and
    # the generation config's ids, together.
    stop_tokens: StopTokens | None = None
    lora: LoraSection | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class TeacherSection(Section):
    kind: Literal["none", "self", "model"] = "none"
    weights: Literal["initial", "ema", "live", "adapter_off", "trust_region"] | None = None  # kind = "self"
    ema_rate: Annotated[float, Field(gt=0, le=1)] | None = (
        None  # weights = "ema": teacher += rate * (student - teacher)
    )
    # weights = "trust_region": logits = (1 - share) initial + share live student
    student_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    path: Words | None = None  # kind = "model"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: the student's
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] | None = (
        None  # default: the student's, as far as the teacher's template reads them
    )
    close_thinking: bool | None = None  # default: as the student. false beside the student's true: OPSD's asymmetry
    system: str | None = None  # default: the student's; "" is none
    trust_remote_code: bool = False


class ViewSection(Section):
    """[views.NAME]: somebody who reads something, beside the view "teacher" that [teacher] and [context] are."""

    teacher: TeacherSection = TeacherSection()
    context: SerializeAsAny[Context] = NoContext()
    count: PositiveInt = 1  # readings of every answer, each with other evidence; fewer where there is no more


class DataSection(Section):
    train: Words
    # A name, or { name = "tool_use", feedback = "reveal" }: see `opdkit tasks`. "none": nobody grades, rewards are
    # unknown, and prompts alone are enough; for methods that need no reward.
    task: ChosenTask = resolve_task("none")
    # Where data.train keeps things under other names, e.g. { prompt = "q" }; roles are those of `data/schema.py`.
    columns: Annotated[Mapping[str, str | Strings], AfterValidator(_roles)] = {}
    limit: PositiveInt | None = None
    instruction: Literal["auto", "boxed", "answer_line", "none"] = "auto"
    max_prompt_tokens: PositiveInt = 2048  # longer prompts leave the data set, and are counted


class SamplingSection(Section):
    engine: Literal["hf"] = "hf"
    group_size: Answers = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_answer_tokens: PositiveInt = 1024
    # Rows times length that are in memory together. Default: 65536, and for sampling on CUDA (also of evaluations) what
    # half of the free memory holds. It moves time and not answers.
    max_tokens_per_batch: PositiveInt | None = None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_answer_tokens=self.max_answer_tokens,
        )


class TrainSection(Section):
    steps: PositiveInt
    problems_per_step: PositiveInt = 32
    # The step's problems in so many parts, each an update of the weights: the later ones learn from answers that an
    # earlier student gave, which is what a clipped ratio and [weights] importance are for.
    updates_per_step: PositiveInt = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-6  # AdamW moves a weight by about so much
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: gradients are not clipped
    max_tokens_per_micro_batch: PositiveInt = 32768
    save_every: Count = 50  # 0: only at the end
    keep_checkpoints: PositiveInt = 2
    save_rows_every: Count = 1  # 0: never


class EvalSection(Section):
    data: str | Strings | None = None  # None: no evaluation
    limit: PositiveInt | None = None
    samples: Answers = 8
    every: Count = 0  # besides before and after training; 0: not
    before: bool = True
    teacher: bool = True  # evaluate the teacher once, as the student is evaluated (without its context)
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    max_answer_tokens: PositiveInt | None = None  # default: sampling.max_answer_tokens

    def params(self, sampling: SamplingSection) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_answer_tokens=self.max_answer_tokens or sampling.max_answer_tokens,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        return () if self.data is None else (self.data,) if isinstance(self.data, str) else self.data


class DiagnosticsSection(Section):
    """What student and teacher agree on, during training: the metrics `overlap/...`. Needs a teacher; moves nothing."""

    every: Count = 10  # steps; also the last one; 0: never
    rows: PositiveInt = 16  # answers of such a step, drawn by a seed
    k: PositiveInt | None = None  # length of both lists; default: 16, or an eighth of a small vocabulary
    bucket_tokens: PositiveInt = 1024  # of an answer's positions

    def due(self, step: int, num_steps: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == num_steps - 1)


class LogSection(Section):
    sinks: Annotated[
        tuple[Annotated[str, _exists_in(SINKS)], ...], Field(strict=False)
    ] = ()  # besides metrics.jsonl, which is always written


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    seed: Seed = 42
    runs_dir: Words = "runs"
    model: ModelSection
    teacher: TeacherSection = TeacherSection()
    context: Context = NoContext()
    views: Mapping[str, ViewSection] = {}
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    method: Method
    weights: Weights = Weights()
    schedule: Mapping[str, Points] = {}  # what changes while the run trains, by its dotted key (schedule.py)
    train: TrainSection
    eval: EvalSection = EvalSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()
    log: LogSection = LogSection()
    # What a default of the method gave way to, in sentences: of this reading, and no part of the recipe.
    _yielded: tuple[str, ...] = PrivateAttr(())

    @property
    def yielded(self) -> tuple[str, ...]:
        return self._yielded

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    @property
    def needs(self) -> Needs:
        """What views and the grader must provide for the method and the weights."""
        return self.method.needs | self.weights.needs

    @property
    def model_paths(self) -> dict[str, str]:
        """{key: path} of the models that are loaded."""
        teachers = {"teacher.path": self.teacher.path}
        teachers |= {f"views.{name}.teacher.path": view.teacher.path for name, view in self.views.items()}
        return {"model.path": self.model.path, **{key: path for key, path in teachers.items() if path}}

    @property
    def all_views(self) -> dict[str, ViewSection]:
        """By name; the first is "teacher", where [teacher] names somebody."""
        teacher = ViewSection(teacher=self.teacher, context=self.context)
        return {**({"teacher": teacher} if self.teacher.kind != "none" else {}), **self.views}

    def as_dict(self) -> dict[str, Any]:
        """Complete and resolved, for `recipe.toml`; keys that are None are left out, as TOML has no null."""
        resolved = self.model_dump(mode="json", exclude_none=True)
        chosen = {"method": self.method, "context": self.context}  # dumped as what they are, not as their base class
        resolved |= {key: value.model_dump(mode="json", exclude_none=True) for key, value in chosen.items()}
        del resolved["schedule"]
        points = {key: points.as_toml() for key, points in self.schedule.items()}
        return resolved | ({"schedule": points} if points else {})


def did_you_mean(word: str, known: Mapping[str, Any] | Sequence[str], label: str = "choices") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else f" ({label}: {', '.join(known)})"
