"""Evaluation: sample, grade, write, summarise. What is written is never sampled again.

Every answer goes to a JSONL file as soon as its batch is graded, under its (problem, sample) key. Its seed is (seed,
"evaluate", problem id, sample id) whatever the model: before, after and teacher are compared on the same draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from opdkit.contexts.render import Renderer, read_chat_template
from opdkit.data.readers import load_problems
from opdkit.engines.base import Sampler, SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.measure.accuracy import Accuracy, Answer, accuracy, answers_of
from opdkit.measure.intervals import Estimate
from opdkit.tasks import TASKS
from opdkit.tasks.base import Task
from opdkit.train.console import Bar, Interrupt
from opdkit.train.jsonl import append_lines, open_lines
from opdkit.train.rollouts import sample_rollouts
from opdkit.train.run_folder import atomic_write
from opdkit.train.student import pick_device
from opdkit.types import Problem

ANSWERS_PER_BATCH = 512  # what a crash can cost
MAX_TOKENS_PER_BATCH = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What `opdkit evaluate` was asked. All of it but the device identifies the answers."""

    model: str
    data: tuple[str, ...]
    task: str
    num_samples: int
    limit: int | None
    temperature: float
    top_p: float
    top_k: int
    max_answer_tokens: int
    seed: int
    dtype: str
    device: str
    chat_template: str | None
    template_kwargs: Mapping[str, Any]
    instruction: str
    trust_remote_code: bool


class Store:
    """A JSONL file of answers. Its first line says what they are answers to; another file is refused, not mixed in."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._header = {"identity": json.loads(json.dumps(identity))}
        rows = open_lines(path)
        self._is_new = not rows  # the header is written with the first answers: a refused evaluation leaves nothing
        if rows:
            check_identity(path, rows[0]["identity"], self._header["identity"])
        self.answers = [Answer(**{k: v for k, v in row.items() if k != "text"}) for row in rows[1:]]

    def append(self, answers: Sequence[Answer], texts: Sequence[str]) -> None:
        rows = [{**asdict(a), "text": t} for a, t in zip(answers, texts, strict=True)]
        append_lines(self.path, [self._header, *rows] if self._is_new else rows)
        self._is_new = False


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless what is in the file and what is to be added answer the same question."""
    differ = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if differ:
        said = ", ".join(f"{key} = {found.get(key)!r} (now {wanted.get(key)!r})" for key in differ)
        raise UserError(f"{path} holds answers to another question: {said}; choose another --out")


def evaluate(
    problems: Sequence[Problem],
    *,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    num_samples: int,
    seed: int,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Accuracy of `num_samples` answers to every problem; what `store` already holds is not sampled again."""
    kept = {(a.problem_id, a.sample_id): a for a in store.answers} if store else {}
    pairs = [(problem, sample_id) for problem in problems for sample_id in range(num_samples)]
    missing = [(problem, sample_id) for problem, sample_id in pairs if (problem.id, sample_id) not in kept]
    answers = [kept[problem.id, sample_id] for problem, sample_id in pairs if (problem.id, sample_id) in kept]
    for start in range(0, len(missing), ANSWERS_PER_BATCH):
        rollouts = sample_rollouts(
            missing[start : start + ANSWERS_PER_BATCH],
            sampler=sampler,
            renderer=renderer,
            task=task,
            params=params,
            identity=(seed, "evaluate"),
            policy_version=0,
        )
        fresh = answers_of(rollouts)
        if store:
            store.append(fresh, [renderer.answer_text(rollout.answer_ids) for rollout in rollouts])
        answers += fresh
        if progress:
            progress(len(answers), len(pairs))
    return accuracy(answers, seed=seed)


def evaluate_model(options: EvaluateOptions, *, out: Path | None, console: Console) -> dict[str, Accuracy]:
    """`opdkit evaluate`: every data set, resumable; writes result.json. UserError for what cannot be evaluated."""
    check_options(options)
    sets = {
        source: load_problems(source, task=options.task, limit=options.limit, instruction=options.instruction)
        for source in options.data
    }
    folder = out or Path("runs") / "evaluate" / _slug(options.model)
    stores = {
        source: Store(folder / f"{_slug(source)}.jsonl", _identity(options, source, data.fingerprint))
        for source, data in sets.items()
    }
    engine, renderer = load_engine(options)
    task, interrupt = TASKS[options.task](), Interrupt(console)
    results: dict[str, Accuracy] = {}
    params = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_answer_tokens=options.max_answer_tokens,
    )
    try:
        with interrupt.listening():
            for source, data in sets.items():
                for where, why in data.dropped[:3]:
                    console.print(f"[yellow]dropped[/yellow] {where}: {why}", highlight=False, soft_wrap=True)
                if len(data.dropped) > 3:
                    console.print(
                        f"[yellow]dropped[/yellow] {len(data.dropped)} rows of {source} in all", highlight=False
                    )
                with Bar(console, source, len(data.problems) * options.num_samples) as bar:

                    def heard(done: int, total: int, bar: Bar = bar) -> None:
                        bar.update(done)
                        interrupt.check()

                    results[source] = evaluate(
                        data.problems,
                        sampler=engine,
                        renderer=renderer,
                        task=task,
                        params=params,
                        num_samples=options.num_samples,
                        seed=options.seed,
                        store=stores[source],
                        progress=heard,
                    )
                console.print(f"{source}: {sentence(results[source])}", highlight=False, soft_wrap=True)
    finally:
        task.close()
    written = folder / "result.json"
    atomic_write(written, json.dumps({"options": asdict(options), "eval": results}, indent=1))
    console.print(f"wrote {written}", highlight=False, soft_wrap=True)
    return results


def load_engine(options: EvaluateOptions) -> tuple[HFEngine, Renderer]:
    model = LanguageModel.load(
        options.model,
        dtype=getattr(torch, options.dtype),
        device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
        chat_template=options.chat_template,
    )
    renderer = Renderer(model.tokenizer, chat_template=model.chat_template, template_kwargs=options.template_kwargs)
    return HFEngine(model, max_tokens_per_batch=MAX_TOKENS_PER_BATCH), renderer


def sentence(e: Accuracy) -> str:
    """One line a person reads."""
    avg = e["avg_at_n"]
    text = f"avg@{e['samples']} {_interval(avg)}"
    if e["samples"] > 1:
        n = e["samples"]
        text += f", pass@{n} {_interval(e['pass_at_k'][str(n)])}, maj@{n} {_interval(e['maj_at_n'])}"
    text += f" over {e['problems']} problems"
    counts = {"truncated": e["num_truncated"], "without answer": e["num_no_answer"], "ungraded": e["num_ungraded"]}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{text} ({said})" if said else text


def _interval(estimate: Estimate) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "unknown"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def check_options(options: EvaluateOptions) -> None:
    if options.task not in TASKS:
        raise UserError(f"--task {options.task} is not a task; choose one of {', '.join(TASKS)}")
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {options.dtype}: choose float32 or bfloat16")
    if options.instruction not in ("auto", "boxed", "answer_line", "none"):
        raise UserError(f"--instruction {options.instruction}: choose auto, boxed, answer_line or none")
    if options.temperature == 0 and options.num_samples > 1:
        raise UserError(
            f"-n {options.num_samples} with --temperature 0 samples the same greedy answer every time; use -n 1"
        )


def _identity(options: EvaluateOptions, source: str, fingerprint: str) -> dict[str, Any]:
    asked = asdict(replace(options, data=(source,)))
    del asked["device"], asked["num_samples"]  # more samples of the same evaluation are welcome
    asked["chat_template"] = read_chat_template(options.chat_template)  # the text: a file may change
    return {**asked, "fingerprint": fingerprint, "model_files": model_digest(Path(options.model))}


def model_digest(folder: Path) -> str | None:
    """Of what makes a local model's answers: weights, config, tokenizer and template, and an adapter's base.

    Of a weight file: its size and a MiB at start, middle and end. Training moves every weight, so this tells a
    retrained model at the same path without reading it whole. None for a hub id.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - (1 << 20))) if path.suffix == ".safetensors" else (0,):
                file.seek(start)
                digest.update(file.read(1 << 20) if path.suffix == ".safetensors" else file.read())
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(str(model_digest(Path(base)) if base else None).encode())
    return digest.hexdigest()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip("._")
