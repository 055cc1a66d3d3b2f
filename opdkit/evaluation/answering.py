"""Who answers for a model that stays as it is: transformers in this process, a vLLM that is started and ended with the
command, or a server that runs. An engine beside this process needs no weights here: tokenizer and configuration do."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opdkit.contexts.render import Renderer, read_chat_template
from opdkit.engines.base import Sampler
from opdkit.engines.hf import HFEngine
from opdkit.engines.load import adapter_base, load_max_positions, load_num_rows, load_words, pick_device
from opdkit.engines.model import LanguageModel
from opdkit.engines.servers.base import Vocabulary
from opdkit.engines.servers.process import VllmOptions, VllmProcess
from opdkit.engines.servers.served import Served, Weights
from opdkit.engines.tokens.stops import find_stops
from opdkit.engines.tokens.vocabulary import num_tokens
from opdkit.errors import UserError
from opdkit.evaluation.episodes import check_stage, make_stage
from opdkit.evaluation.options import EvaluateOptions
from opdkit.hub import TRUSTED
from opdkit.recipe.episode import EpisodeSection
from opdkit.rollouts.stage import Stage
from opdkit.run.console import Console, say, told_while_waiting


@dataclass(frozen=True, slots=True)
class Answering:
    sampler: Sampler
    renderer: Renderer
    room: int | None  # positions of a prompt and its answer together; None: no limit known

    def check_fits(self, lengths: list[int], what: str) -> None:
        """Raise UserError for a row of more tokens than there is room for."""
        for row, length in enumerate(lengths):
            if self.room is not None and length > self.room:
                raise UserError(
                    f"row {row} needs {length} positions ({what}), but the model has {self.room} here; shorten the "
                    "prompt, lower max_answer_tokens, or use a model (or a server) with a longer context"
                )


@contextmanager
def answering(
    options: EvaluateOptions, console: Console, folder: Path, now: datetime | None = None
) -> Iterator[Answering]:
    """Inside the block the model of `options` answers. folder: for the log of an engine. now: the date for a chat
    template that prints it; None: today's."""
    how: dict[str, Any] = {
        "template_kwargs": options.template_kwargs,
        "close_thinking": options.close_thinking,
        "system": options.system,
        "now": now,
    }
    if options.trust_remote_code:
        say(console, f"--trust-remote-code: {TRUSTED.format(options.model)}", mark="warning")
    if options.engine == "hf":
        model = LanguageModel.load(
            options.model,
            dtype=getattr(torch, options.dtype),
            device=pick_device(options.device),
            trust_remote_code=options.trust_remote_code,
            chat_template=options.chat_template,
            stop_tokens=options.stop_tokens,
        )
        for warning in model.warnings:
            say(console, warning, mark="warning")
        engine = HFEngine(model, max_tokens_per_batch=options.max_tokens_per_batch)
        yield Answering(engine, model.renderer(**how), model.max_positions)
        return
    tokenizer, generation = load_words(options.model, options.trust_remote_code)
    template = read_chat_template(options.chat_template)
    stops = find_stops(Renderer(tokenizer, template), generation, options.stop_tokens, name=options.model)
    rows, tokens = load_num_rows(options.model, options.trust_remote_code), num_tokens(tokenizer)
    vocabulary = Vocabulary(
        num_tokens=tokens if rows is None else min(rows, tokens),
        num_rows=tokens if rows is None else rows,
        stop_ids=stops.ids,
        max_positions=load_max_positions(options.model, options.trust_remote_code),
        tokenizer=tokenizer,
    )
    asked = AskedEngine(
        options.model,
        options.engine,
        options.url,
        options.dtype,
        options.trust_remote_code,
        bool((options.episode or {}).get("stop")),
    )
    with served(asked, vocabulary, console, folder) as one:
        yield Answering(one.engine(), Renderer(tokenizer, template, stop_ids=stops.ids, **how), one.max_model_len)


@contextmanager
def stage_of(options: EvaluateOptions, who: Answering) -> Iterator[Stage | None]:
    """Inside the block, where the episodes of `options` are played; None: answers have one turn."""
    if options.episode is None:
        yield None
        return
    section = EpisodeSection.model_validate(options.episode)
    check_stage(section, (who.renderer, who.renderer.stop_ids), {})
    how: dict[str, Any] = {"positions": who.room, "turn_tokens": section.turn_tokens(options.max_answer_tokens)}
    stage = make_stage(section, who.renderer, who.renderer.stop_ids, **how, go_ahead=options.engine != "hf")
    try:
        yield stage
    finally:
        stage.pool.close()


class AskedEngine(NamedTuple):
    """Which model an engine beside this process answers for."""

    model: str
    engine: str
    url: str | None
    dtype: str
    trust_remote_code: bool
    reads_text: bool = False  # answers may end at a text


@contextmanager
def served(asked: AskedEngine, vocabulary: Vocabulary, console: Console, folder: Path) -> Iterator[Served]:
    """A model, an adapter too, behind --engine vllm or --engine server."""
    base = adapter_base(Path(asked.model))
    process = None
    if asked.engine == "vllm":
        spool = Path(tempfile.mkdtemp(prefix="opdkit-"))
        own = VllmOptions(
            model=base or asked.model,
            dtype=asked.dtype,
            lora_rank=None if base is None else _rank(Path(asked.model)),
            trust_remote_code=asked.trust_remote_code,
            reads_text=asked.reads_text,
        )
        process = VllmProcess(own, log=folder / "vllm.log", folder=spool)

    def doubt(sentence: str) -> None:
        say(console, sentence, mark="warning")

    one = Served(vocabulary=vocabulary, process=process, url=asked.url, url_key="--url", doubts=doubt)
    try:
        with told_while_waiting(console, "starting vLLM" if process else f"looking for {asked.url}") as waiting:
            one.waiting = waiting
            about = one.open()
        one.waiting = lambda seconds: None
        if process is None and not _same(about.root, base or asked.model):
            raise UserError(
                f"--url {asked.url} serves {about.root or 'a model it does not name'}, and --model is "
                f"{base or asked.model}; name the model that is served"
            )
        if base is not None:
            name = f"opdkit-{secrets.token_hex(4)}"
            one.publish(Weights(name, str(Path(asked.model).resolve()), name))
        yield one
    finally:
        one.close()


def _same(root: str, model: str) -> bool:
    """Whether two names are of one model, as far as names tell: a container has other folders."""
    if os.path.isdir(root) and os.path.isdir(model):
        return os.path.samefile(root, model)
    return Path(root).name == Path(model).name


def _rank(adapter: Path) -> int:
    try:
        return int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{adapter}/adapter_config.json names no rank r ({error}); copy the adapter again") from None
