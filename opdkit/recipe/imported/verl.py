"""The keys of the verl trainer under SDPO and MOPD, and of the baselines that are trained with it.

Where one of theirs is one of ours it is a row of `KEYS`; where several say one thing together there is a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opdkit.errors import UserError
from opdkit.recipe.imported.lines import Fate, Imported, Line
from opdkit.recipe.imported.multi_turn import multi_turn
from opdkit.recipe.imported.siblings import self_distillation, updates_per_step
from opdkit.recipe.imported.unlike import MOVES, UNKNOWN, why_left_out

METHODS = {
    "sdpo": "sdpo",
    "vanilla": "grpo",
    "grpo": "grpo",
    "dpo": "dpo",
    "simpo": "simpo",
    "sft": "verified_sft",
    "verified_sft": "verified_sft",
}
REDUCTIONS = {"seq-mean-token-mean": "sequence", "seq-mean-token-sum": "sequence_sum"}


@dataclass(frozen=True, slots=True)
class Key:
    """One of theirs that is one of ours."""

    ours: str
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


def _one_file(value: Any) -> str:
    files = value if isinstance(value, list) else [value]
    if len(files) != 1 or not isinstance(files[0], str):
        raise ValueError("a recipe trains on one file: join them, or choose one with --set data.train=FILE")
    return files[0]


def _files(value: Any) -> list[str]:
    return [str(file) for file in value] if isinstance(value, list) else [str(value)]


def _off(value: Any) -> Any:
    return 0 if value is None or value == -1 else value


def _schedule(value: Any) -> str:
    if value not in ("constant", "cosine"):
        raise ValueError("choose train.schedule yourself: constant, linear or cosine")
    return str(value)


def _kl_estimate(value: Any) -> str:
    if value not in ("low_var_kl", "k3"):
        raise ValueError("the known estimate is low_var_kl (k3); exact is the whole vocabulary's")
    return "k3"


def _sinks(value: Any) -> list[str]:
    return [sink for sink in _files(value) if sink in ("wandb", "tensorboard", "trackio")]


KEYS: Mapping[str, Key] = {
    "model.path": Key("model.path"),
    "model.trust_remote_code": Key("model.trust_remote_code"),
    "model.enable_gradient_checkpointing": Key("model.gradient_checkpointing"),
    "actor.optim.lr": Key("train.lr", float),
    "actor.optim.lr_warmup_steps": Key("train.warmup_steps", lambda value: max(0, value), "-1 is none"),
    "actor.optim.weight_decay": Key("train.weight_decay", float),
    "actor.optim.lr_scheduler_type": Key("train.schedule", _schedule),
    "actor.optim.warmup_style": Key("train.schedule", _schedule),
    "actor.optim.betas": Key("train.betas"),
    "actor.grad_clip": Key("train.max_grad_norm", float),
    "rollout.n": Key("sampling.group_size"),
    "rollout.temperature": Key("sampling.temperature", float, "both sides of the loss are at it too"),
    "rollout.top_p": Key("sampling.top_p", float),
    "rollout.min_p": Key("sampling.min_p", float),
    "rollout.top_k": Key("sampling.top_k", _off, "-1 is off, here 0"),
    "rollout.val_kwargs.n": Key("eval.samples"),
    "rollout.val_kwargs.temperature": Key("eval.temperature", float),
    "rollout.val_kwargs.top_p": Key("eval.top_p", float),
    "rollout.val_kwargs.top_k": Key("eval.top_k", _off, "-1 is off, here 0"),
    "data.train_files": Key("data.train", _one_file),
    "data.val_files": Key("eval.data", _files),
    "data.train_batch_size": Key("train.problems_per_step"),
    "data.max_prompt_length": Key("data.max_prompt_tokens", note="longer prompts leave the data and are counted"),
    "data.max_response_length": Key("sampling.max_answer_tokens"),
    "data.seed": Key("seed"),
    "trainer.total_training_steps": Key("train.steps"),
    "trainer.project_name": Key("log.project"),
    "trainer.experiment_name": Key("name", lambda value: re.sub(r"[^A-Za-z0-9._-]", "-", value)),
    "trainer.save_freq": Key("train.save_every", lambda value: max(0, value), "-1 is never, here 0"),
    "trainer.test_freq": Key("eval.every", lambda value: max(0, value), "-1 is never, here 0"),
    "trainer.val_before_train": Key("eval.before"),
    "trainer.logger": Key("log.sinks", _sinks, "metrics.jsonl and the console are always there"),
}  # fmt: skip


TEMPLATE_KWARGS = "data.apply_chat_template_kwargs."

# Settings that several keys say together are read by the functions below.
TOGETHER = (
    "actor.self_distillation.", "actor.policy_loss.", "actor.loss_agg_mode", "actor.clip_ratio", "actor.use_kl_loss",
    "actor.kl_loss_", "actor.ppo_micro_batch_size_per_gpu", "actor.ppo_mini_batch_size",
    "ref.model.path", "model.lora_rank", "model.lora_alpha", "model.target_modules",
    "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo", "algorithm.rollout_correction.",
)  # fmt: skip


def translate(settings: Mapping[str, Any], *, task: str | None = None, parity: bool = False) -> Imported:
    """The recipe that says what `settings` say, with a line for each key.

    task    who grades (`opdkit tasks`); None: from the data's name
    parity  also take over what opdkit does otherwise on purpose: the published choice of peers, rows without context in
            the mean's denominator

    Raises UserError for an objective that has no counterpart here.
    """
    known = {_short(key): value for key, value in settings.items()}
    imported = Imported()
    method = _method(known, imported)
    multi_turn(known, imported)
    told = {line.key for line in imported.lines}
    for key, value in known.items():
        if not key.startswith(TOGETHER) and key not in told:
            _take(imported, key, value, known)
    if method == "sdpo":
        self_distillation(known, imported, parity)
    else:
        _reward_terms(method, known, imported)
    _reduction(method, known, imported)
    _batches(known, imported)
    _sampler_correction(method, known, imported)
    _lora(known, imported)
    told = {line.key for line in imported.lines}
    for key in [key for key in known if key not in told]:
        adds_kl = key == "actor.use_kl_loss" and known[key]
        note = f"{MOVES}: {method} has no KL to a reference here" if adds_kl else "of a part that this run does not use"
        imported.lines.append(Line(key, known[key], "left out", None, note))
    name = str(known.get("data.train_files", ""))
    imported.put("data.task", task or _task_of(name))
    imported.lines.append(Line("(data)", name, "default", "data.task", "from the data's name" if task is None else ""))
    return imported


def _short(key: str) -> str:
    """Without `actor_rollout_ref.`, which says nothing; files of one section may start below it."""
    key = key.removeprefix("actor_rollout_ref.")
    return f"actor.{key}" if key.startswith("self_distillation.") else key


def _take(imported: Imported, key: str, value: Any, known: Mapping[str, Any]) -> None:
    row = KEYS.get(key)
    if row is None and key.startswith(TEMPLATE_KWARGS):
        row = Key(f"model.template_kwargs.{key.removeprefix(TEMPLATE_KWARGS)}")
    if row is None:
        reason = why_left_out(key, value, known)
        fate: Fate = "not known" if reason is None else "left out"
        imported.lines.append(Line(key, value, fate, None, reason or UNKNOWN))
        return
    if isinstance(value, str) and "$" in value:
        imported.lines.append(Line(key, value, "left out", None, f"names a variable; give --set {row.ours}=..."))
        return
    try:
        ours = row.convert(value)
    except (TypeError, ValueError) as error:
        imported.lines.append(Line(key, value, "left out", None, str(error)))
        return
    imported.put(row.ours, ours)
    imported.lines.append(Line(key, value, "same", row.ours, row.note))


def _method(known: Mapping[str, Any], imported: Imported) -> str:
    key = "actor.policy_loss.loss_mode"
    distils = any(name.startswith("actor.self_distillation.") for name in known)
    mode = known.get(key, "sdpo" if distils else "vanilla")
    if not isinstance(mode, str) or mode not in METHODS:
        raise UserError(f"{key} = {mode!r} has no counterpart here; known: {', '.join(METHODS)}")
    method = METHODS[mode]
    if method == "grpo" and known.get("algorithm.adv_estimator", "grpo") != "grpo":
        estimator = known["algorithm.adv_estimator"]
        raise UserError(f"algorithm.adv_estimator = {estimator!r} has no counterpart here; known: grpo")
    imported.put("method.name", method)
    imported.lines.append(Line(key, mode, "same" if key in known else "default", "method.name", ""))
    if "algorithm.adv_estimator" in known:
        note = "" if method == "grpo" else "computed there and not used by this loss"
        value = known["algorithm.adv_estimator"]
        imported.lines.append(Line("algorithm.adv_estimator", value, "same" if not note else "left out", None, note))
    return method


def _reward_terms(method: str, known: Mapping[str, Any], imported: Imported) -> None:
    """GRPO's clips, baseline and KL; the pairs of DPO and SimPO."""

    def take(key: str, ours: str, convert: Callable[[Any], Any] = float, note: str = "") -> None:
        if key in known and known[key] is not None:
            try:
                imported.put(ours, convert(known[key]))
            except (TypeError, ValueError) as error:
                raise UserError(f"{key} = {known[key]!r} cannot be {ours}: {error}") from None
            imported.lines.append(Line(key, known[key], "same", ours, note))

    if method == "grpo":
        take("actor.clip_ratio", "method.clip_low")
        take("actor.clip_ratio", "method.clip_high")
        take("actor.clip_ratio_low", "method.clip_low")
        take("actor.clip_ratio_high", "method.clip_high")
        take("actor.clip_ratio_c", "method.dual_clip")
        if known.get("actor.clip_ratio_c") is None:
            imported.put("method.dual_clip", 3.0)
            imported.lines.append(Line("actor.clip_ratio_c", 3.0, "default", "method.dual_clip", ""))
        take(
            "algorithm.norm_adv_by_std_in_grpo", "method.advantage_std", lambda on: "unbiased" if on else "none",
            "false: the group's mean alone",
        )  # fmt: skip
        if known.get("actor.use_kl_loss"):
            take("actor.kl_loss_coef", "method.kl_weight")
            take("actor.kl_loss_type", "method.kl_estimate", _kl_estimate, "without its cap at 10")
            imported.put("teacher", {"kind": "self", "weights": "initial"})
            imported.lines.append(Line("actor.use_kl_loss", True, "same", "teacher.weights = initial", "the reference"))
    elif method in ("dpo", "simpo"):
        take(f"actor.policy_loss.{method}_beta", "method.beta")
        take("actor.policy_loss.simpo_gamma", "method.margin", note="not divided by beta")
        take("actor.policy_loss.label_smoothing", "method.label_smoothing")


def _reduction(method: str, known: Mapping[str, Any], imported: Imported) -> None:
    """`token-mean` is a mean inside a micro-batch there: with one row in each it is a mean over rows."""
    key, rows = "actor.loss_agg_mode", known.get("actor.ppo_micro_batch_size_per_gpu", 1)
    mode = known.get(key, "token-mean")
    if method in ("dpo", "simpo"):
        return
    ours, note = REDUCTIONS.get(str(mode)), ""
    if mode == "token-mean":
        ours = "sequence" if rows == 1 else "token"
        note = (
            "with micro-batches of one row that is the mean over rows" if rows == 1
            else f"with micro-batches of {rows} rows it depends on how rows fall together; here it is over the batch"
        )  # fmt: skip
    if ours is None:
        imported.lines.append(Line(key, mode, "left out", None, "choose method.reduction yourself"))
        return
    imported.put("method.reduction", ours)
    imported.lines.append(Line(key, mode, "same" if key in known else "default", f"method.reduction = {ours}", note))


def _batches(known: Mapping[str, Any], imported: Imported) -> None:
    key = "actor.ppo_micro_batch_size_per_gpu"
    if key in known:
        note = "micro-batches are by tokens here and change no number"
        imported.lines.append(Line(key, known[key], "left out", None, note))
    key = "actor.ppo_mini_batch_size"
    if key in known and (updates := updates_per_step(known)) is not None:
        imported.put("train.updates_per_step", updates)
        imported.lines.append(Line(key, known[key], "same", "train.updates_per_step", "both count problems"))
    elif key in known:
        note = "does not divide data.train_batch_size: choose train.updates_per_step yourself"
        imported.lines.append(Line(key, known[key], "left out", None, note))


def _sampler_correction(method: str, known: Mapping[str, Any], imported: Imported) -> None:
    prefix = "algorithm.rollout_correction."
    level, cap = known.get(f"{prefix}rollout_is"), known.get(f"{prefix}rollout_is_threshold") or 2.0
    cap = float(cap) if isinstance(cap, int) else cap  # anything else is refused with the recipe
    for key, value in known.items():
        if not key.startswith(prefix):
            continue
        if level is None or key.removeprefix(prefix) not in ("rollout_is", "rollout_is_threshold"):
            imported.lines.append(Line(key, value, "left out", None, "nothing is corrected for, or not by this"))
        elif method == "grpo":
            imported.lines.append(Line(key, value, "left out", None, "grpo's ratio is to the sampler already"))
        elif "importance_cap" in imported.recipe["method"]:
            note = "method.importance_cap is a ratio to the sampler already"
            imported.lines.append(Line(key, value, "left out", None, note))
        else:
            imported.put("weights.importance", {"level": level, "cap": cap})
            imported.lines.append(Line(key, value, "same", "weights.importance", ""))


def _lora(known: Mapping[str, Any], imported: Imported) -> None:
    keys = {
        "model.lora_rank": ("r", 0),
        "model.lora_alpha": ("alpha", 16),
        "model.target_modules": ("target_modules", "all-linear"),
    }
    rank = known.get("model.lora_rank", 0)
    if rank:
        imported.put("model.lora", {ours: known.get(key, default) for key, (ours, default) in keys.items()})
    for key, (ours, default) in keys.items():
        if not rank and key in known:
            imported.lines.append(Line(key, known[key], "left out", None, "no adapter: its rank is 0"))
        elif rank:
            fate: Fate = "same" if key in known else "default"
            imported.lines.append(Line(key, known.get(key, default), fate, f"model.lora.{ours}", ""))


def _task_of(data: str) -> str:
    name = data.lower()
    for task, marks in {
        "tool_use": ("tooluse", "tool_use", "toolalpaca"),
        "multiple_choice": ("sciknoweval", "gpqa", "science"),
        "code": ("livecodebench", "humaneval", "mbpp", "lcb"),
    }.items():
        if any(mark in name for mark in marks):
            return task
    return "math"
