"""What a stage of a pipeline can do besides training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from opdkit.recipe.fields import (
    MANY,
    Answers,
    Count,
    PositiveInt,
    Section,
    Seed,
    StopTokens,
    Strings,
    Words,
)


class Asked(Section):
    """Whose answers to what: the options of `opdkit sample` and `opdkit evaluate`, with their defaults."""

    model: Words
    data: Words
    task: str
    n: Answers = 1
    limit: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    max_answer_tokens: PositiveInt = 1024
    max_tokens_per_batch: PositiveInt | None = None
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = {}
    close_thinking: bool = False
    system: str | None = None
    stop_tokens: StopTokens | None = None
    instruction: Literal["auto", "boxed", "answer_line", "none"] = "auto"
    trust_remote_code: bool = False


class Sample(Asked):
    reject: Strings = ("truncated", "no_answer", "repetition")
    attempts: Answers = 3


class Evaluate(Asked):
    n: Answers = 8


class MakeModel(Section):
    """The options of `opdkit make-model`."""

    data: Words
    hidden_size: Annotated[int, Field(ge=16, le=MANY)] = 64
    num_layers: PositiveInt = 3
    vocab_size: Annotated[int, Field(ge=300, le=2**20)] = 2048
    steps: Count = 300
    seed: Seed = 0
    limit: PositiveInt | None = None


class Export(Section):
    """The options of `opdkit export`, of an earlier stage that trains."""

    run: Words  # the stage, as {NAME}
    step: Count | None = None  # None: the last
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    adapter: bool = False
    license: str | None = None

    @property
    def folder(self) -> Path:
        """{NAME} is the model of a stage's last checkpoint, three folders below the run."""
        return Path(self.run).parents[2]
