"""Recipes: TOML in, one frozen, fully resolved object out. Nothing unknown or impossible gets past this file.

Precedence: the method's defaults (the paper) < the recipe < `--set a.b=c`. Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from opdkit.contexts import CONTEXTS, Context
from opdkit.contexts.none import NoContext
from opdkit.engines.base import SamplingParams
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.weighting import PROBLEM_WEIGHTS, TOKEN_WEIGHTS, Weights
from opdkit.metrics import SINKS
from opdkit.tasks import TASKS
from opdkit.types import Needs

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML's arrays arrive as lists


def _exists_in(table: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"does not exist{_did_you_mean(name, table)}")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LoraSection(Section):
    """No dropout: the policy that samples must be the policy that is trained."""

    r: PositiveInt = 64
    alpha: PositiveInt = 128
    target_modules: str | Strings = "all-linear"


class ModelSection(Section):
    """The student."""

    path: str  # a folder in Hugging Face format, or a hub id
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; what is trained is kept in float32
    device: str = "auto"
    chat_template: str | None = None  # a jinja file, or "plain", for tokenizers that have none
    template_kwargs: Mapping[str, Any] = {}  # passed to the chat template, e.g. { enable_thinking = false }
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
    path: str | None = None  # kind = "model"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: the student's
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] | None = None  # default: the student's
    trust_remote_code: bool = False


class DataSection(Section):
    train: str
    task: Annotated[str, _exists_in(TASKS)]
    limit: PositiveInt | None = None
    instruction: Literal["auto", "boxed", "answer_line", "none"] = "auto"
    max_prompt_tokens: PositiveInt = 2048  # longer prompts leave the data set, and are counted


class SamplingSection(Section):
    engine: Literal["hf"] = "hf"
    group_size: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_answer_tokens: PositiveInt = 1024
    max_tokens_per_batch: PositiveInt = 65536

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
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: gradients are not clipped
    max_tokens_per_micro_batch: PositiveInt = 32768
    save_every: Count = 50  # 0: only at the end
    keep_checkpoints: PositiveInt = 2
    save_rows_every: Count = 1  # 0: never


class EvalSection(Section):
    data: str | Strings | None = None  # None: no evaluation
    limit: PositiveInt | None = None
    samples: PositiveInt = 8
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


class LogSection(Section):
    sinks: Annotated[
        tuple[Annotated[str, _exists_in(SINKS)], ...], Field(strict=False)
    ] = ()  # besides metrics.jsonl, which is always written


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Count = 42
    runs_dir: str = "runs"
    model: ModelSection
    teacher: TeacherSection = TeacherSection()
    context: Context = NoContext()
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    method: Method
    weights: Weights = Weights()
    train: TrainSection
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def needs(self) -> Needs:
        """What the teacher and the grader must provide for the method and the weights."""
        return self.method.needs | self.weights.needs

    def as_dict(self) -> dict[str, Any]:
        """Complete and resolved, for `recipe.toml`; keys that are None are left out, as TOML has no null."""
        resolved = self.model_dump(mode="json", exclude_none=True)
        chosen = {"method": self.method, "context": self.context}  # dumped as what they are, not as their base class
        return resolved | {key: value.model_dump(mode="json", exclude_none=True) for key, value in chosen.items()}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, validate. Raises UserError with one line for every fault found."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a recipe file (*.toml)") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return parse_recipe(raw, overrides, where=str(path))


def parse_recipe(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """The same for a recipe that is already a dict (quickstart, tests)."""
    merged = _merge({}, raw)
    for key, value in key_values(overrides).items():
        _override(merged, key, value)
    faults: list[str] = []
    method = _choice(merged.get("method"), "method", "name", METHODS, faults)
    if isinstance(method, Method):
        merged = _merge(_defaults_of(method, merged), merged)
    context = _choice(merged.get("context", {"kind": "none"}), "context", "kind", CONTEXTS, faults)
    if isinstance(merged.get("weights"), Mapping):
        merged["weights"] = _weights(merged["weights"], faults)
    recipe = None
    try:
        # Stand-ins keep the other sections' faults visible when one of these two is at fault.
        chosen = {"method": method or METHODS["sft"].model_validate({"name": "sft"}), "context": context or NoContext()}
        recipe = Recipe.model_validate({**merged, **chosen})
    except ValidationError as error:
        faults += _sentences(error, Recipe)
    if recipe is not None and method is not None and context is not None:
        faults += impossible(recipe)
    if faults:
        raise UserError("\n".join(f"{where}: {fault}" for fault in faults))
    assert recipe is not None
    return recipe


def impossible(recipe: Recipe) -> list[str]:
    """Every combination of legal values that cannot work, each as a sentence with the way out."""
    return [fault for rule in (_teacher_faults, _method_faults, _data_faults) for fault in rule(recipe)]


def warnings(recipe: Recipe) -> list[str]:
    """What works and is probably not meant, each as a sentence."""
    return [*recipe.method.warnings(recipe), *_missing_paths(recipe)]


def _missing_paths(recipe: Recipe) -> Iterator[str]:
    """Local paths where nothing is. They may be made later, and what looks like a hub id may be one."""
    named = {"model.path": recipe.model.path, "teacher.path": recipe.teacher.path, "data.train": recipe.data.train}
    for key, path in [*named.items(), *(("eval.data", source) for source in recipe.eval.sources)]:
        is_local = path and (path.startswith((".", "/", "~")) or path.endswith((".jsonl", ".json", ".parquet")))
        if path and is_local and not Path(path).expanduser().exists():
            yield f"{key} = {path}: there is no such file or folder yet"


def _teacher_faults(recipe: Recipe) -> Iterator[str]:
    teacher, lora = recipe.teacher, recipe.model.lora
    if teacher.kind == "model" and teacher.path is None:
        yield 'teacher.kind = "model" needs teacher.path: a folder in Hugging Face format, or a hub id'
    if teacher.kind != "model" and teacher.path is not None:
        yield f'teacher.path = "{teacher.path}" is only read with teacher.kind = "model"; set that, or remove the path'
    if teacher.kind == "self" and teacher.weights is None:
        yield (
            'teacher.kind = "self" needs teacher.weights: "initial", "ema", "live", "trust_region" or "adapter_off" '
            "(LoRA)"
        )
    if teacher.kind != "self" and teacher.weights is not None:
        yield f'teacher.weights = "{teacher.weights}" is only read with teacher.kind = "self"; set that, or remove it'
    for key in ("dtype", "chat_template", "trust_remote_code") if teacher.kind != "model" else ():
        if getattr(teacher, key):
            yield f'teacher.{key} = {getattr(teacher, key)!r} is only read with teacher.kind = "model"; remove it'
    is_adapter = lora is not None or (Path(recipe.model.path) / "adapter_config.json").exists()
    if teacher.weights == "adapter_off" and not is_adapter:
        yield (
            'teacher.weights = "adapter_off" needs a LoRA student, whose base model is the teacher; '
            'add [model] lora = {}, or use teacher.weights = "initial"'
        )
    if teacher.weights == "ema" and teacher.ema_rate is None:
        yield 'teacher.weights = "ema" needs teacher.ema_rate, e.g. 0.05 (teacher += rate * (student - teacher))'
    if teacher.weights != "ema" and teacher.ema_rate is not None:
        yield f'teacher.ema_rate = {teacher.ema_rate} is only read with teacher.weights = "ema"; set that, or remove it'
    if (teacher.weights == "trust_region") != (teacher.student_share is not None):
        yield (
            f'teacher.weights = "{teacher.weights}" and teacher.student_share = {teacher.student_share}: '
            'weights = "trust_region" mixes logits, initial * (1 - student_share) + student * student_share; '
            "set both (e.g. 0.05) or neither"
        )
    if teacher.weights == "trust_region" and recipe.method.answer_source == "teacher":
        yield (
            'teacher.weights = "trust_region" scores answers and cannot write them, but method.answers = "teacher"; '
            'use teacher.weights = "initial" or "ema"'
        )


def _method_faults(recipe: Recipe) -> Iterator[str]:
    method, teacher = recipe.method, recipe.teacher
    asks_teacher = recipe.needs.teacher != "none"
    if (asks_teacher or method.answer_source == "teacher") and teacher.kind == "none":
        alone = method.needs.teacher == "none" and method.answer_source != "teacher"
        who = "what [weights] compares" if alone else f'method.name = "{method.name}"'
        yield (
            f'{who} needs a teacher, but teacher.kind = "none"; '
            'set [teacher] kind = "model" and path, or kind = "self" and weights'
        )
    if not asks_teacher and method.answer_source != "teacher" and teacher.kind != "none":
        yield (
            f'teacher.kind = "{teacher.kind}" would load a teacher that method.name = "{method.name}" never asks; '
            'remove [teacher], or set kind = "none"'
        )
    if recipe.context.kind != "none" and not asks_teacher:
        yield (
            f'context.kind = "{recipe.context.kind}" is what the teacher reads while scoring, but method.name = '
            f'"{method.name}" asks no teacher to score; set context.kind = "none"'
        )
    if recipe.context.needs_siblings and recipe.sampling.group_size == 1:
        yield (
            f'context.kind = "{recipe.context.kind}" shows the teacher other answers to the same problem, but '
            "sampling.group_size = 1 samples no other; use 2 or more (the papers: 8)"
        )
    if asks_teacher and teacher.kind == "self" and teacher.weights == "live" and recipe.context.kind == "none":
        yield (
            'teacher.weights = "live" with context.kind = "none" compares the student with itself: the loss is zero; '
            "give the teacher a context, or other weights"
        )
    if method.answer_source == "student" and recipe.sampling.temperature == 0 and recipe.sampling.group_size > 1:
        yield (
            f"sampling.group_size = {recipe.sampling.group_size} with sampling.temperature = 0 samples the same greedy "
            "answer every time; raise the temperature, or set group_size = 1"
        )
    yield from method.faults(recipe)
    yield from recipe.weights.faults(recipe)


def _data_faults(recipe: Recipe) -> Iterator[str]:
    if recipe.eval.every and not recipe.eval.sources:
        yield f"eval.every = {recipe.eval.every} needs eval.data: what to evaluate on"
    if recipe.train.warmup_steps >= recipe.train.steps:
        yield (
            f"train.warmup_steps = {recipe.train.warmup_steps} leaves none of train.steps = {recipe.train.steps} at "
            "the full learning rate; lower it"
        )


def _choice(
    section: Any, where: str, key: str, table: Mapping[str, type[BaseModel]], faults: list[str]
) -> BaseModel | None:
    """The row of `table` that `section[key]` names, made from the section's other keys."""
    if not isinstance(section, Mapping) or key not in section:
        faults.append(f"{where}.{key} is missing; set it to one of {', '.join(table)}")
        return None
    name = section[key]
    if not isinstance(name, str) or name not in table:
        faults.append(f"{where}.{key} = {name!r} does not exist{_did_you_mean(str(name), table)}")
        return None
    try:
        return table[name].model_validate(section)
    except ValidationError as error:
        faults += _sentences(error, table[name], prefix=f"{where}.")
        return None


def _weights(section: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The section with the rows of their tables that `tokens.name` and `problems.name` choose."""
    chosen = dict(section)
    for key, table in (("tokens", TOKEN_WEIGHTS), ("problems", PROBLEM_WEIGHTS)):
        if key in chosen:
            chosen[key] = _choice(chosen[key], f"weights.{key}", "name", table, faults)
    return chosen


def _defaults_of(method: Method, merged: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's sections. A section that names another kind (or a teacher with other weights) starts afresh: the
    paper's teacher weights say nothing about somebody's own teacher, nor its ema_rate about other weights."""
    defaults: dict[str, Any] = {key: dict(value) for key, value in method.defaults.items()}
    for section, default in defaults.items():
        chosen = merged.get(section)
        if not isinstance(chosen, Mapping):
            continue
        if "kind" in chosen and chosen["kind"] != default.get("kind", chosen["kind"]):
            defaults[section] = {}
        elif "weights" in chosen and chosen["weights"] != default.get("weights", chosen["weights"]):
            defaults[section] = {"kind": default["kind"]}
    return defaults


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = (
            _merge(merged[key], value) if both else (_merge({}, value) if isinstance(value, Mapping) else value)
        )
    return merged


def key_values(settings: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """["a.b=1", "c=x"] -> {"a.b": 1, "c": "x"}: values are TOML, and a bare word is a string."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {setting}: write it as {flag} key=value")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text  # so that quotes need no second quoting in the shell
    return values


def _override(merged: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    target = merged
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {section} is a single value, not a section; set {section} itself")
    target[last] = value


def _sentences(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """pydantic's findings, one sentence each: key, value, reason, way out."""
    sentences = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        key = prefix + ".".join(parts)
        if fault["type"] == "extra_forbidden":
            elsewhere = [
                f"{name}.{parts[-1]}" for name in Recipe.model_fields if parts[-1] in _known_keys(Recipe, [name])
            ]
            known = _known_keys(root, parts[:-1])
            hint = f"; there is {elsewhere[0]}" if elsewhere else _did_you_mean(parts[-1], known, "keys here")
            sentences.append(f"{key} is not a key{hint}")
        elif fault["type"] == "missing":
            sentences.append(f"{key} is missing; add it")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            whole = not parts  # a fault of the section, not of one key: its sentence names the keys itself
            sentences.append(reason if whole else f"{key} = {fault['input']!r}: {reason[0].lower()}{reason[1:]}")
    return sentences


def _known_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for part in path:
        field = model.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _did_you_mean(word: str, known: Mapping[str, Any] | Sequence[str], label: str = "choices") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else f" ({label}: {', '.join(known)})"
