"""What makes an evaluation the one that it is: its options, checked, and what must be the same where it goes on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from opdkit.contexts.render import read_chat_template
from opdkit.engines.load import check_model_path, model_digest
from opdkit.errors import UserError
from opdkit.evaluation.eval_sets import EvalSet
from opdkit.evaluation.options import EvaluateOptions, check_engine
from opdkit.recipe.episode import EpisodeSection
from opdkit.recipe.rules.whole import number_faults
from opdkit.run.stored_answers import question_of
from opdkit.tasks.guard import task_named
from opdkit.tasks.options import TaskOptions


def check_options(options: EvaluateOptions, tasks: Collection[str]) -> None:
    check_engine(options.engine, options.url)
    for task in tasks:
        task_named(task, may_be_none=True)  # `opdkit sample` needs nobody
    check_model_path(options.model)
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {options.dtype}: choose float32 or bfloat16")
    if options.instruction not in ("auto", "boxed", "answer_line", "none"):
        raise UserError(f"--instruction {options.instruction}: choose auto, boxed, answer_line or none")
    if faults := list(number_faults({"--temperature": options.temperature, "--top-p": options.top_p})):
        raise UserError(faults[0])
    if not math.isfinite(options.temperature) or not options.temperature >= 0 or not 0 <= options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} and --top-p {options.top_p}: give numbers from 0 on, --top-p up to 1"
        )
    if options.top_p == 0:
        raise UserError(
            "--top-p 0 leaves no token to draw; use 1 to leave it off, or --temperature 0 for the likeliest"
        )
    if options.temperature == 0 and options.num_samples > 1:
        raise UserError(
            f"-n {options.num_samples} with --temperature 0 samples the same greedy answer every time; use -n 1"
        )


def identity_of(options: EvaluateOptions, set_: EvalSet, fingerprint: str, clock: datetime) -> dict[str, Any]:
    task = task_named(set_.task).main
    asked = question_of(asdict(replace(options, data=(set_.name,), task=task.text)))
    asked |= own_files(task, options.episode)
    del asked["num_samples"]  # more samples are welcome
    asked["chat_template"] = read_chat_template(options.chat_template)  # the text: a file may change
    digest = model_digest(Path(options.model))
    return {**asked, "fingerprint": fingerprint, "model_files": digest, "clock": clock.isoformat()}


def own_files(task: TaskOptions, episode: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """For the identity of answers: a grader or an environment of one's own that has changed is another one."""
    found: dict[str, Any] = {"task_files": task.user_files} if task.user_files else {}
    if episode is not None:
        found["environment_files"] = EpisodeSection.model_validate(episode).environment.user_files
    return found
