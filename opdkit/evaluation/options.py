"""What `opdkit evaluate` was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkit.engines.base import SamplingParams
from opdkit.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What `opdkit evaluate` was asked. All of it but device and batch size identifies the answers."""

    model: str
    data: tuple[str, ...]
    task: str  # one line, as `tasks.options.resolve_task` reads it
    num_samples: int
    limit: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_answer_tokens: int = 1024
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "auto"
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    instruction: str = "auto"
    trust_remote_code: bool = False
    close_thinking: bool = False
    system: str | None = None
    stop_tokens: tuple[str | int, ...] | None = None
    max_tokens_per_batch: int | None = None  # as `HFEngine`'s
    engine: str = "hf"  # as sampling.engine: "hf", "vllm" or "server"
    url: str | None = None  # engine = "server": where it is
    episode: Mapping[str, Any] | None = None  # [episode], complete: answers are episodes; None: they have one turn

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_answer_tokens=self.max_answer_tokens,
        )


def check_engine(engine: str, url: str | None) -> None:
    """Raises UserError for an engine that there is not, and for one that lacks its address."""
    if engine not in ("hf", "vllm", "server"):
        raise UserError(f"--engine {engine}: choose hf, vllm or server")
    if (engine == "server") != (url is not None):
        raise UserError("--engine server and --url go together: what answers, and where it is")
