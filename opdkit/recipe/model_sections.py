"""Sections of a recipe that name models: the student, a teacher, a view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from opdkit.contexts import Context
from opdkit.contexts.none import NoContext
from opdkit.recipe.fields import (
    PositiveInt,
    Section,
    StopTokens,
    Strings,
    Words,
)
from opdkit.types import SpanSpread


class LoraSection(Section):
    """No dropout: the policy that samples must be the policy that is trained."""

    r: PositiveInt = 64  # rank of the adapter matrices
    alpha: PositiveInt = 128  # the adapter's output is scaled by alpha / r
    # "all-linear", a list of module names, or a regular expression for full names, as in peft.
    target_modules: str | Strings = "all-linear"


class ModelSection(Section):
    """The student."""

    path: Words  # a folder in Hugging Face format, or a hub id
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; what is trained is kept in float32
    device: Words = "auto"  # "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", ...
    chat_template: str | None = None  # a jinja file, or "plain", for tokenizers that have none
    template_kwargs: Mapping[str, Any] = {}  # passed to the chat template, e.g. { enable_thinking = false }
    close_thinking: bool = False  # where the template opens <think> in every prompt (R1, Olmo-Think), close it again
    system: str | None = None  # a system prompt, in place of the data's own
    # What ends an answer, as tokens or ids. Default: the chat template's end of turn, the tokenizer's end of text and
    # the generation config's ids, together.
    stop_tokens: StopTokens | None = None
    lora: LoraSection | None = None  # train adapters over a frozen base; not set: all weights are trained
    # Compute activations again in the backward pass: less memory, more time. A number: of only so many layers.
    gradient_checkpointing: bool | PositiveInt = False
    # Keep what the backward pass needs in host memory until then; with gradient_checkpointing, a state per layer.
    activation_offload: bool = False
    attn_implementation: str | None = None  # as in transformers: "sdpa", "eager", ...; default: its own choice
    trust_remote_code: bool = False  # run the Python code that comes with a model


class TeacherSection(Section):
    # No teacher, weights of the student, another model in this process, one that a server holds, or what teachers said
    # in an earlier run.
    kind: Literal["none", "self", "model", "server", "saved"] = "none"
    # kind = "self": the student's first weights, their moving average, the current ones, those without the LoRA
    # adapter, or a mix of the first and the current.
    weights: Literal["initial", "ema", "live", "adapter_off", "trust_region"] | None = None
    # weights = "ema": after every step, teacher += rate * (student - teacher)
    ema_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    # kind = "self": where its own weights are kept. "host" leaves room on the card, and costs a copy each time it reads
    # (ema: and one of the student's after every step).
    weights_on: Literal["device", "host"] = "device"
    # weights = "trust_region": logits = (1 - share) initial + share live student
    student_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    run: Words | None = None  # kind = "saved": the folder of a run with a [spool]; its answers are read again
    # kind = "model": a folder in Hugging Face format, or a hub id. kind = "server": likewise, of the model that is
    # served: its tokenizer is read, and for payload = "hidden" its last norm and its head.
    path: Words | None = None
    url: Words | Annotated[Strings, Field(min_length=1)] | None = None  # kind = "server": one address or several
    served_name: Words | None = None  # kind = "server": the model's name there; default: the only one
    # kind = "server": what is sent. Hidden states (exact, through a folder that both see), or lists of the likeliest
    # tokens, or the answers' own tokens alone (both at temperature 1).
    payload: Literal["hidden", "topk", "sampled"] | None = None
    spool: Words | None = None  # payload = "hidden": that folder, as this machine sees it
    at_once: PositiveInt = 16  # kind = "server": answers that a server reads at one time
    patience_s: Annotated[float, Field(ge=0)] = 60.0  # kind = "server": how long a failed answer is asked for again
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # kind = "server": how long one try may take
    # kind = "model": it scores the student's token ids, or it has another tokenizer: it reads the text of the answer,
    # and tokens of both sides with the same bytes are compared.
    tokens: Literal["same", "align"] = "same"
    # tokens = "align": what is told of a span of several tokens (support = "sampled" alone). exact: nothing, one token
    # is one token; macro: its whole advantage to each; even, proportional: a share of it to each.
    span: SpanSpread = "exact"
    pair_stops: bool = True  # tokens = "align": both sides' ends of a turn are one pair, so that stopping is taught
    dtype: Literal["float32", "bfloat16"] | None = None  # default: the student's
    device: Words | None = None  # kind = "model": the card it is on, "cuda:1", ...; default: the student's
    # kind = "model": the weights inside the layers in 8 or 4 bits; needs the extra opdkit[quantized]. `opdkit fit` says
    # how far such a teacher is from the whole one.
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    # kind = "model": on the student's device all the time; in host memory, and on the device while it scores; loaded
    # anew for every step and dropped behind it; or of several ranks each keeps a part of every layer.
    placement: Literal["resident", "cpu", "reload", "sharded"] = "resident"
    chat_template: str | None = None  # of another model: a jinja file, or "plain"; default: the model's own
    # Passed to the teacher's chat template. Default: the student's, as far as the teacher's template reads them.
    template_kwargs: Mapping[str, Any] | None = None
    close_thinking: bool | None = None  # default: as the student. false beside the student's true: OPSD's asymmetry
    system: str | None = None  # a system prompt; default: the student's; "" is none
    trust_remote_code: bool = False  # run the Python code that comes with the model

    @property
    def urls(self) -> tuple[str, ...]:
        return () if self.url is None else (self.url,) if isinstance(self.url, str) else self.url

    @property
    def is_other_model(self) -> bool:
        """Whether it has a tokenizer and a template of its own."""
        return self.kind in ("model", "server")


class ViewSection(Section):
    """[views.NAME]: a model and the context it reads, beside the view "teacher", which is [teacher] and [context]."""

    teacher: TeacherSection = TeacherSection()  # whose weights; keys as in [teacher]
    context: SerializeAsAny[Context] = NoContext()  # what is read; keys as in [context]
    count: PositiveInt = 1  # readings of every answer, each with other peers; fewer where there are no more
