"""A run folder as a run leaves it, every word in it chosen by somebody hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from opdkit import toml
from opdkit.run.rows import save_rows
from opdkit.types import Example, Problem, Rollout, Signal, Taught, View

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&lt;\"'\x00\u202e"
DATASET = "arithmetic:merge-4:test"
BY_BUCKET = {"overlap/reverse_kl@0-1024": 0.25, "overlap/reverse_kl@1024-2048": 0.5, "overlap/num_tokens@0-1024": 9.0}


def result(value: float | None, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    """`E` of summary.json."""
    estimate = {"value": value, "low": low, "high": high, "problems": 512}
    counts = {
        "num_answers": 2048,
        "num_truncated": 0,
        "num_no_answer": 0,
        "num_ungraded": 0,
        "mean_answer_tokens": 18.0,
    }
    return {
        "problems": 512,
        "samples": 4,
        "avg_at_n": estimate,
        "pass_at_k": {"1": estimate, "4": estimate},
        "maj_at_n": estimate,
        **counts,
        **more,
    }


def make_summary(**more: Any) -> dict[str, Any]:
    return {
        "name": f"run {EVIL}",
        "method": "opd",
        "steps": 30,
        "seconds": 7.25,
        "tokens": {"answer": 34560.0, "teacher": 48000.0},
        "eval": {
            "student_before": {DATASET: result(0.229, 0.210, 0.248)},
            "student_after": {DATASET: result(0.836, 0.818, 0.853, num_truncated=240)},
            "teacher": {DATASET: result(0.930, 0.918, 0.941)},
        },
        "arms": {"sft": {"label": f"SFT {EVIL}", "eval": {DATASET: result(0.311, 0.29, 0.332)}, "seconds": 3.0}},
        "warnings": [f"2 rows cannot be used {EVIL}"],
        **more,
    }


def make_rows() -> list[Example]:
    """Six answers to three problems, half of them right; token ids are code points.

    Of every answer's tokens the first is not the model's, the second is left out by a selection, the third is clipped.
    The teacher likes even tokens more than the student does and odd ones less, and read the sibling answer.
    """
    rows = []
    for index in range(6):
        text = f"answer {index} {EVIL}"
        problem = Problem(
            id=f"problem {index % 3} {EVIL}",
            task="arithmetic",
            messages=({"role": f"user {EVIL}", "content": f"question {index % 3} {EVIL}"},),
            gold=f"gold {EVIL}",
        )
        rollout = Rollout(
            problem_id=problem.id,
            sample_id=index // 3,
            policy_version=29,
            prompt_ids=(1, 2),
            answer_ids=tuple(map(ord, text)),
            answer_logprobs=None,
            answer_mask=np.arange(len(text)) > 0,
            finish="length" if index == 5 else "stop",
            reward=float(index < 3),
            parsed=f"parsed {EVIL}",
            feedback=f"feedback {EVIL}",
        )
        view = View(
            context_ids=tuple(map(ord, f"context {EVIL}")),
            sources=((problem.id, 1 - index // 3),),
            num_truncated_tokens=4,
        )
        rows.append(Example(problem=problem, rollout=rollout, views={"teacher": view}, **_scored(len(text))))
    return rows


def _scored(num_tokens: int) -> dict[str, Any]:
    places = np.arange(num_tokens)
    student_T = np.full(num_tokens, np.log(0.5), dtype=np.float32)
    teacher_T = np.log(np.where(places % 2 == 0, 0.75, 0.25)).astype(np.float32)
    coef_T = np.where(places < 2, 0, 0.125).astype(np.float32)
    loss_T = np.where(places < 2, np.nan, 0.25 + places % 5).astype(np.float32)
    taught = Taught(
        terms=(f"reverse_kl {EVIL}",),
        coef_ST=coef_T[None],
        loss_ST=loss_T[None],
        clipped_T=places == 2,
        student_logprob_T=student_T,
        student_entropy_T=np.full(num_tokens, 0.5, dtype=np.float32),
    )
    return {"signals": {"teacher": Signal(sampled_logprob_T=teacher_T)}, "taught": taught}


def decode(ids: Any) -> str:
    return "".join(map(chr, ids))


def byte_tokenizer() -> Any:
    """One token for each byte of UTF-8, as the tokenizers of real models fall back to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_run(folder: Path) -> None:
    for name in ("rows", "eval"):
        (folder / name).mkdir(parents=True)
    recipe = {
        "name": f"run {EVIL[:20]}",
        "train": {"steps": 30},
        "method": {"name": "opd"},
        "model": {"path": "nowhere"},
    }
    (folder / "recipe.toml").write_text(toml.dumps(recipe))
    (folder / "environment.json").write_text(json.dumps({"versions": {"opdkit": "0.1.0", "vllm": None}, "cpu": EVIL}))
    (folder / "summary.json").write_text(json.dumps(make_summary()))
    for step in (0, 10, 30):
        evaluation = {DATASET: result(0.2 + step / 50, 0.18 + step / 50, 0.22 + step / 50)}
        (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(evaluation))
    (folder / "eval" / "teacher.json").write_text(json.dumps({DATASET: result(0.93, 0.918, 0.941)}))
    lines = [
        {
            "step": step,
            "time": 1.0,
            "train/loss": 2 / step,
            "rollout/reward": None if step == 7 else step / 30,
            "rollout/num_rows": 64.0,
            "rollout/num_truncated": float(step == 3),
            "train/num_skipped_steps": float(step == 4),
            "teacher/num_rows_too_long": float(step == 5),
            "metrics/num_sink_failures": 0.0 if step < 9 else 3.0,
            "custom/<script>": 1.0,
            **({"overlap/ratio": 0.5, **BY_BUCKET} if step % 10 == 0 else {}),
        }
        for step in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_rows(folder / "rows" / "step_000030.parquet", make_rows())


def write_answers(folder: Path, step: int, rewards: list[float]) -> None:
    """The answers behind an evaluation: two to each problem (p00, p01, ...), both of its reward."""
    identity = {"sets": {DATASET: {"fingerprint": "f", "task": "arithmetic"}}, "temperature": 1.0}
    rows = [
        {"data": DATASET, "problem_id": f"p{index:02}", "sample_id": sample, "reward": reward, "parsed": str(reward),
         "finish": "stop", "num_tokens": 3, "text": "x"}
        for index, reward in enumerate(rewards)
        for sample in range(2)
    ]  # fmt: skip
    lines = [{"identity": identity}, *rows]
    (folder / "eval" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
