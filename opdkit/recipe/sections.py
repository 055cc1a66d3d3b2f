"""The keys of a recipe: one class a section, with defaults and reasons. A wrong type or an unknown key is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr

from opdkit.contexts import Context
from opdkit.contexts.none import NoContext
from opdkit.engines.base import SamplingParams
from opdkit.engines.forward.passes import Passes, passes_on
from opdkit.methods.base import Method
from opdkit.methods.weighting import Weights
from opdkit.methods.weighting.base import Named
from opdkit.metrics import SINKS
from opdkit.recipe.data import DataSection, EvalSection, RouteSection
from opdkit.recipe.episode import EpisodeSection
from opdkit.recipe.fields import (
    MANY,
    Answers,
    Count,
    Decay,
    PositiveInt,
    Section,
    Seed,
    Strings,
    Words,
    as_tuple,
    exists_in,
)
from opdkit.recipe.model_sections import ModelSection, TeacherSection, ViewSection
from opdkit.recipe.points import Points
from opdkit.recipe.sentinels import SentinelsSection
from opdkit.recipe.stop_when import is_condition, is_evaluation
from opdkit.recipe.user_code import digests_of
from opdkit.tasks.options import TaskOptions
from opdkit.tasks.several import side_by_side
from opdkit.types import Needs


class VllmSection(Section):
    """How sampling.engine = "vllm" is started."""

    python: Words | None = None  # of the environment that has vLLM; default: $OPDKIT_VLLM_PYTHON, or ours
    # Share of the GPU's memory that the engine takes for weights and cache. Default: vLLM's own (0.9), which leaves no
    # room for a trainer beside it.
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel_size: PositiveInt = 1  # GPUs that the engine is spread over
    # Of several ranks: so many neighbours of a machine share an engine, on their GPUs. Default: all of a machine.
    ranks_per_engine: PositiveInt | None = None
    max_model_len: PositiveInt | None = None  # prompt and answer together; default: the model's positions
    quantization: Words | None = None  # as vLLM names it ("fp8"); with [model.lora] only
    extra_args: Strings = ()  # further options of vLLM's server; they come last


class SamplingSection(Section):
    # What samples: transformers in this process, a vLLM that opdkit starts and stops, or a server that runs at `url`.
    engine: Literal["hf", "vllm", "server"] = "hf"
    url: Words | None = None  # engine = "server": where it is, as http://HOST:PORT
    server_kind: Literal["vllm", "sglang"] = "vllm"  # engine = "server": what it is
    vllm: VllmSection = VllmSection()  # engine = "vllm": how it is started
    # engine = "vllm", on the trainer's GPU: what it does while the trainer scores and learns. "sleep" frees its memory.
    when_idle: Literal["keep", "sleep"] = "keep"
    # Answers of a step come from the weights of so many steps before, sampled while the trainer works on older ones.
    # The lag is fixed: the same recipe gives the same numbers.
    lag: Count = 0
    group_size: Answers = 1  # answers to each problem of a step
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: off
    top_k: Count = 0  # 0: off
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0: off
    max_answer_tokens: PositiveInt = 1024  # longer answers are cut, and counted
    # Rows times length that are sampled together, and the most that are scored together; it changes time, not answers.
    # Default: 65536, and on CUDA (evaluations too) what half of the memory beside weights and optimizer state holds.
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
    steps: PositiveInt  # each samples answers to problems_per_step problems and updates the weights
    problems_per_step: PositiveInt = 32  # each is answered sampling.group_size times
    # The step's problems in so many parts, each an update of the weights: the later ones learn from answers that an
    # earlier student gave, which is what a clipped ratio and [weights] importance are for.
    updates_per_step: PositiveInt = 1
    # muon: for matrices; the rest has AdamW. adamw_8bit: its moments in 8 bits (needs torchao), 2 bytes in place of 8.
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    # Of the weights that are trained. bfloat16: rounded at random after every step, so that small steps are not lost;
    # gradients too are bfloat16, and nothing is copied for the computation: 4 bytes a parameter in place of 10.
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-6  # AdamW moves a weight by about so much
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate; the last two fall to 0
    warmup_steps: Count = 0  # over which the learning rate rises from 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled, as in AdamW
    # Of the moments of AdamW.
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: gradients are not clipped
    # How answers are put together; memory and time, not mathematics. What is not given goes by the kind of device, and
    # stands in the run's recipe.toml: CPU 4096, CUDA 32768, MPS 8192 tokens of a backward pass.
    max_tokens_per_micro_batch: PositiveInt | None = None
    # Of a pass that scores: CPU 4096, CUDA 65536, MPS 8192; at most sampling.max_tokens_per_batch.
    max_tokens_per_scoring_pass: PositiveInt | None = None
    # What a pass with padding costs whatever it reads, in tokens: CPU 32, CUDA 1024, MPS 256.
    fixed_tokens_per_pass: PositiveInt | None = None
    # What several answers read before they differ is computed once, if that saves so many tokens: "auto" is CPU 64,
    # CUDA 256, MPS 128. false: never (to look for a fault).
    share_prefixes: Literal["auto", False] | PositiveInt = "auto"
    save_every: Count = 50  # steps between checkpoints; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # older ones are deleted
    # Checkpoints are completed while the next steps are taken, from copies of optimizer and teacher in host memory.
    save_in_background: bool = False
    # An evaluation's metric, "eval/SET/avg_at_n" (docs/reference/run_folder.md): the checkpoint of its best value is
    # kept too, and summary.json names it. The run's result stays the last one.
    keep_best: Annotated[Words, AfterValidator(is_evaluation)] | None = None
    # End before the last step, where one of these holds: "METRIC >= NUMBER" (or <=, <, >; "... for 3": three times in a
    # row), "eval/SET/avg_at_n stalls for 5" (the last five are not better than the best before them).
    stop_when: Annotated[tuple[Annotated[str, AfterValidator(is_condition)], ...], BeforeValidator(as_tuple)] = ()
    # The mean of the weights of so many last checkpoints is written beside them, and evaluated. Not of LoRA.
    average_last: Annotated[int, Field(ge=2, le=MANY)] | None = None
    save_rows_every: Count = 1  # steps between files of training rows; 0: never

    def passes(self, device: str, *, learning: bool) -> Passes:
        """How rows are put together on a kind of device ("cpu", "cuda", "mps"), in passes that learn or score."""
        default = passes_on(device, learning=learning)
        max_tokens = self.max_tokens_per_micro_batch if learning else self.max_tokens_per_scoring_pass
        return Passes(
            max_tokens=max_tokens or default.max_tokens,
            fixed_tokens=self.fixed_tokens_per_pass or default.fixed_tokens,
            least_shared=default.least_shared if self.share_prefixes == "auto" else self.share_prefixes or None,
        )

    def on_device(self, device: str) -> TrainSection:
        """With what goes by the kind of device."""
        learning, scoring = self.passes(device, learning=True), self.passes(device, learning=False)
        chosen = {
            "max_tokens_per_micro_batch": learning.max_tokens,
            "max_tokens_per_scoring_pass": scoring.max_tokens,
            "fixed_tokens_per_pass": learning.fixed_tokens,
            "share_prefixes": learning.least_shared or False,
        }
        return self.model_copy(update=chosen)


class SpoolSection(Section):
    """What teachers say of every answer is kept in the run's folder, for `opdkit replay`. Off without this section."""

    max_gib: Annotated[float, Field(gt=0)] = 50.0  # of disk; the steps behind that are not kept, and counted
    # Of hidden states. Default: as they are computed, so that a replay's gradients are the run's; the others take a
    # half or a quarter of float32, float8 with a scale for each token.
    dtype: Literal["bfloat16", "float8"] | None = None


class DiagnosticsSection(Section):
    """How far student and teacher agree: the metrics `overlap/...`. Needs a teacher; does not affect training."""

    every: Count = 10  # steps between comparisons; the last step has one too; 0: never
    rows: PositiveInt = 16  # answers that are compared, drawn by a seed
    k: PositiveInt | None = None  # length of both top-k lists; default: 16, or an eighth of a small vocabulary
    bucket_tokens: PositiveInt = 1024  # numbers are also given for every so many positions of an answer

    def due(self, step: int, num_steps: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == num_steps - 1)


class LogSection(Section):
    # "tensorboard", "wandb", "trackio", besides metrics.jsonl, which is always written.
    sinks: Annotated[tuple[Annotated[str, exists_in(SINKS)], ...], Field(strict=False)] = ()
    # Of wandb and trackio. None: as their environment variable says, else "opdkit".
    project: Words | None = None


class ParallelSection(Section):
    """Several processes (`opdkit train --ranks N`, or torchrun): docs/guides/parallel.md."""

    # How they keep the student. "gathered": each has all weights while a step is made. "sharded": a layer while a pass
    # is in it. "auto": gathered where that takes at most half of a GPU's memory, by the model's size.
    strategy: Literal["auto", "gathered", "sharded"] = "auto"
    # strategy = "sharded": so many neighbouring ranks (a machine's) keep one copy of the layers in parts, the next ones
    # another, and gradients are summed over all. Default: all ranks keep one copy.
    hsdp: Annotated[int, Field(ge=2, le=MANY)] | None = None
    offload: bool = False  # strategy = "sharded": parts, gradients and the optimizer's state in host memory
    # How long a rank waits for another one's answer before the run ends. More than the longest sampling of a step takes
    # beside the shortest.
    timeout_minutes: Annotated[float, Field(gt=0, le=10_080)] = 30.0


class Recipe(Section):
    # Of the run and its folder: letters, digits, ".", "_" and "-".
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    seed: Seed = 42  # every random draw of the run follows from it
    runs_dir: Words = "runs"  # the run is written to runs_dir/name/
    model: ModelSection  # the student
    teacher: TeacherSection = TeacherSection()  # who scores the answers
    context: Context = NoContext()  # what the teacher reads
    views: Mapping[str, ViewSection] = {}  # further views, by name
    data: DataSection  # the problems, and who grades
    sampling: SamplingSection = SamplingSection()  # how the student answers
    episode: EpisodeSection | None = None  # several turns in an environment, in place of one answer
    method: Method  # the loss: a published method, or its keys changed
    weights: Weights = Weights()  # which tokens count and how much
    route: RouteSection | None = None  # each domain asks its own teacher, in place of [teacher] and [context]
    schedule: Mapping[str, Points] = {}  # keys that change during the run, by their dotted names (schedule.py)
    train: TrainSection  # steps, optimizer, checkpoints
    spool: SpoolSection | None = None  # whether what teachers say is kept
    eval: EvalSection = EvalSection()  # what is evaluated and when
    diagnostics: DiagnosticsSection = DiagnosticsSection()  # how far student and teacher agree
    sentinels: SentinelsSection = SentinelsSection()  # what is done when a run goes wrong
    log: LogSection = LogSection()  # where metrics go
    parallel: ParallelSection = ParallelSection()  # where there are several processes
    # What a default of the method gave way to, in sentences: of this reading, and no part of the recipe.
    _yielded: tuple[str, ...] = PrivateAttr(())

    @property
    def yielded(self) -> tuple[str, ...]:
        return self._yielded

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    def on_device(self, device: str) -> Recipe:
        """Complete for a kind of device ("cpu", "cuda", "mps"): what a run writes down."""
        return self.model_copy(update={"train": self.train.on_device(device)})

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
    def user_files(self) -> dict[str, str]:
        """{what the recipe names: sha256} of the user's own tasks, methods, contexts and weights, and of what their
        files import from beside them."""
        chosen: dict[str, Method | Context | Named] = {
            f"method {self.method.name}": self.method,
            f"context {self.context.kind}": self.context,
            **{f"context {view.context.kind}": view.context for view in self.views.values()},
            **{f"weight {part.name}": part for part in self.weights.chosen},
        }
        found = {f"task {name}": digest for name, digest in self.grader.user_files.items()}
        if self.episode is not None:
            files = self.episode.environment.user_files
            found |= {f"environment {name}": digest for name, digest in files.items()}
        return found | {
            f"{name}{part}": digest for name, model in chosen.items() for part, digest in digests_of(model).items()
        }

    @property
    def saved_run(self) -> str | None:
        """The run whose answers are read again; None: answers are new."""
        return next((view.teacher.run for view in self.all_views.values() if view.teacher.kind == "saved"), None)

    @property
    def eval_tasks(self) -> dict[str, TaskOptions]:
        """By source: who grades each set of eval.data."""
        named = {one.path: (one.task, self.data.set_of(one.domain)) for one in self.eval.sets}
        return {
            source: task or (self.data.task if domain is None else self.data.task_of(domain))
            for source, (task, domain) in named.items()
        }

    @property
    def grader(self) -> TaskOptions:
        """Who grades all answers, those of evaluations also. Raises ValueError as `side_by_side`."""
        own = [task for task in self.eval_tasks.values() if not task.is_none]
        return side_by_side([*self.data.graders, *own])

    @property
    def answering(self) -> dict[str, ViewSection]:
        """Whoever reads as the teacher, by name: the views of [route], or [teacher] and [context]; {}: nobody does."""
        names = self.route.readers if self.route else ("teacher",)
        return {name: view for name, view in self.all_views.items() if name in names}

    @property
    def asked_views(self) -> set[str]:
        """The names of [views] whose word somebody wants."""
        teaches = self.needs.teacher is not None or self.method.answer_source == "teacher"
        return {*self.needs.views, *(self.route.readers if self.route and teaches else ())}

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the data, those that route and contexts name."""
        named = [column for view in self.all_views.values() for column in view.context.needs_columns]
        return tuple(dict.fromkeys([*([self.route.column] if self.route else []), *named]))

    @property
    def context_files(self) -> dict[str, str]:
        """{key: path} of the texts that contexts show."""
        keys = {view: "context" if view == "teacher" else f"views.{view}.context" for view in self.all_views}
        read = {f"{keys[name]}.file": view.context.reads_file for name, view in self.all_views.items()}
        return {key: path for key, path in read.items() if path}

    @property
    def longest_turn(self) -> int:
        """Tokens that are sampled at once: sampling.max_answer_tokens, or the most that the schedule makes of it."""
        points = self.schedule.get("sampling.max_answer_tokens")
        scheduled = [] if points is None else [value for _, value in points.points]
        most = max([self.sampling.max_answer_tokens, *scheduled])
        return most if self.episode is None else self.episode.turn_tokens(most)

    @property
    def longest_answer(self) -> int:
        """Tokens behind a prompt: of an episode all its turns, and what is said between them."""
        return self.longest_turn if self.episode is None else self.episode.episode_tokens(self.longest_turn)

    @property
    def all_views(self) -> dict[str, ViewSection]:
        """By name; the first is "teacher", where [teacher] names one."""
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
