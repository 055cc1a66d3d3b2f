"""What `opdkit analyse signal` was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.analysis.signal.conditions import Design
from opdkit.analysis.signal.sampling import SamplingOptions
from opdkit.measure.ranking import Definitions


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalOptions:
    """What `opdkit analyse signal` was asked."""

    folder: Path
    steps: tuple[str, ...]
    model: str | None = None  # the teacher
    rollouts: Path | None = None
    sampling: SamplingOptions | None = None
    limit: int | None = None
    conditions: str = "all"
    design: Design = "fixed"
    context: Mapping[str, Any]  # keys of [context] that say how peers are shown, not who
    chat_template: str | None = None  # None, and no kwargs: as the answers were sampled or trained on
    template_kwargs: Mapping[str, Any]
    close_thinking: bool = False
    system: str | None = None
    stop_tokens: tuple[str, ...] | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    trust_remote_code: bool = False
    max_tokens_per_batch: int | None = None
    engine: str = "hf"  # what samples answers; the teacher scores in this process
    url: str | None = None
    seed: int = 0
    definitions: Definitions = "careful"
    resamples: int | None = None  # of the published bootstrap; None: as many as published
