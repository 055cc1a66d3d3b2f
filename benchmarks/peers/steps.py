"""A whole training step without its sampling: score, learn, optimizer. The same models, prompts and answers.

Answers are made beforehand and given to both sides: opdkit's sampler is replaced by one that hands them out, TRL's
trainers by a `model.generate` that does. All else is a trainer's own, `trainer.train()` with AdamW in float32, all
answers in one micro-batch (TRL) or in what `max_tokens_per_micro_batch` makes of them (opdkit, its default).

    opd    reverse KL over the whole vocabulary to another model   DistillationTrainer, GKDTrainer, GOLDTrainer
    sdpo   JSD on the student's 100 likeliest and a bucket, EMA     SDPOTrainer
    opsd   reverse KL on the same, the teacher reads a solution      SDFTTrainer
    grpo   one update a batch, no reference                          GRPOTrainer
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .models import NUM_SPECIAL, lengths, make_models, texts
from .parts import parts
from .worker import Meter, Prepared, Talk

LR = 1e-6
NUM_RIGHT = 2  # answers of each group, the first ones
SUCCESS = "\nCorrect solution:\n\n{}"
CLOSING = "\n\nCorrectly solve the original question."


class Data:
    """Prompts, solutions and answers of one step."""

    def __init__(self, case: dict[str, Any]) -> None:
        vocabulary = case["vocabulary"]
        self._kept = tempfile.TemporaryDirectory(prefix="opdkit-bench-")  # removed with the process
        self.folder = Path(self._kept.name)
        make_models(self.folder, case["model"], vocabulary)
        self.prompts = texts(case["problems"], case["prompt"], vocabulary, "prompts")
        self.solutions = texts(case["problems"], case.get("solution", 32), vocabulary, "solutions")
        self.group = case["group"]
        random = torch.Generator().manual_seed(0)
        first, stop = NUM_SPECIAL + 2, NUM_SPECIAL - 1  # letters but white space, and what ends an answer
        self.answers = [
            [*torch.randint(first, vocabulary, (length - 1,), generator=random).tolist(), stop]
            for length in lengths(case)
        ]


def prepare(case: dict[str, Any]) -> Prepared:
    """opdkit's side."""
    from opdkit.training.step import train_step

    data = Data(case)
    run = opdkit_run(case, data)
    problems = list(run.data.problems)
    groups = groups_of(run, data)
    run.state.sample = lambda problems, step: groups

    def step() -> dict[str, Any]:
        rows, _ = train_step(run.state, problems)
        views = [row.views["teacher"] for row in rows if "teacher" in row.views]
        return {"context_tokens": sum(len(view.context_ids) for view in views)}

    told: dict[str, Any] = told_of(groups)
    if case["method"] == "sdpo":
        told["parts"] = parts(step, case["vocabulary"])
    return step, told


def opdkit_run(case: dict[str, Any], data: Data) -> Any:
    from rich.console import Console

    from opdkit.recipe import parse_recipe
    from opdkit.training.loop import TrainingRun
    from opdkit.training.parts import Parts
    from opdkit.training.problems.data import training_data
    from opdkit.types import Problem

    problems = [
        Problem(id=str(number), task="math", messages=({"role": "user", "content": text},), gold="0", solution=solution)
        for number, (text, solution) in enumerate(zip(data.prompts, data.solutions, strict=True))
    ]
    method: dict[str, dict[str, Any]] = {
        "opd": {"method": {"name": "opd"}, "teacher": {"kind": "model", "path": str(data.folder / "teacher")}},
        "sdpo": {
            "method": {"name": "sdpo"},
            "context": {"kind": "peers", "slots": ["success"], "order": "published"},
        },
        "opsd": {
            "method": {
                "name": "opsd", "divergence": "reverse_kl", "support": "student_topk", "k": 100, "clip": "none",
                "loss_temperature": 1.0,
            },
            "teacher": {"kind": "self", "weights": "ema", "ema_rate": 0.05},
            "context": {"kind": "reference_solution", "template": "prefix"},
        },
        "grpo": {"method": {"name": "grpo"}},
    }  # fmt: skip
    raw = {
        "name": "bench",
        "runs_dir": str(data.folder),
        "model": {"path": str(data.folder / "student"), "dtype": "float32", "device": "cpu"},
        "data": {"train": "given", "task": "math"},
        "sampling": {"max_answer_tokens": case["answer"], "group_size": data.group, "temperature": 1.0},
        "train": {"steps": 1000, "problems_per_step": len(problems), "lr": LR},
        **method[case["method"]],
    }
    recipe = parse_recipe(raw)
    return TrainingRun(recipe, Parts(recipe, None), training_data(recipe, problems), {}, Console(quiet=True))


def groups_of(run: Any, data: Data) -> list[Any]:
    from opdkit.types import Group, Rollout

    groups = []
    for number, problem in enumerate(run.data.problems):
        own = data.answers[number * data.group : (number + 1) * data.group]
        prompt_ids = tuple(run.parts.renderer.prompt_ids(problem.messages))
        rollouts = tuple(
            Rollout(
                problem_id=problem.id, sample_id=place, policy_version=0, prompt_ids=prompt_ids, answer_ids=tuple(ids),
                answer_logprobs=np.full(len(ids), -5.0, dtype=np.float32), answer_mask=np.ones(len(ids), dtype=bool),
                finish="stop", reward=float(place < NUM_RIGHT),
            )
            for place, ids in enumerate(own)
        )  # fmt: skip
        groups.append(Group(problem=problem, rollouts=rollouts))
    return groups


def told_of(groups: Sequence[Any]) -> dict[str, int]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
        "answer_tokens": sum(len(rollout.answer_ids) for rollout in rollouts),
    }


def drive(case: dict[str, Any], meter: Meter, talk: Talk) -> None:
    """TRL's side: its loop asks before each step whether there is another one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    data = Data(case)
    told: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "student")

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(data.folder / name, dtype=torch.float32)

    class Steps(TrainerCallback):
        """The first step warms up and is not asked for."""

        measuring = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step and not self.measuring:
                talk.say({"ready": True, **told})
                self.measuring = True
            if self.measuring:
                if talk.wait():
                    meter.begin()
                else:
                    raise KeyboardInterrupt

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.measuring:
                talk.say(meter.end())

    trainer = TRAINERS[case["side"]](case, data, load, tokenizer, [Steps()])
    model = trainer.model
    own = model.generate
    model.generate = lambda *args, **kwargs: _given(data, tokenizer.pad_token_id, told, kwargs)
    assert own is not model.generate
    try:
        trainer.train()
    except KeyboardInterrupt:
        return


def _given(data: Data, pad_id: int, told: dict[str, Any], asked: dict[str, Any]) -> Any:
    """What `generate` would return: the prompts as they came, and the answers behind them."""
    prompts_BT: Tensor = asked["input_ids"]
    assert len(prompts_BT) == len(data.answers), f"{len(prompts_BT)} prompts for {len(data.answers)} answers"
    longest = max(map(len, data.answers))
    answers_BT = torch.tensor([answer + [pad_id] * (longest - len(answer)) for answer in data.answers])
    told["prompt_tokens"] = int(asked["attention_mask"].sum())
    told["answer_tokens"] = sum(map(len, data.answers))
    whole_BT = torch.cat([prompts_BT, answers_BT], 1)
    config = asked.get("generation_config")
    as_object = asked.get("return_dict_in_generate") or getattr(config, "return_dict_in_generate", False)
    return SimpleNamespace(sequences=whole_BT) if as_object else whole_BT


def _options(case: dict[str, Any], data: Data) -> dict[str, Any]:
    return {
        "output_dir": str(data.folder / "trl"), "max_steps": 1000, "learning_rate": LR,
        "per_device_train_batch_size": len(data.answers), "gradient_accumulation_steps": 1,
        "logging_steps": 10**6, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0, "optim": "adamw_torch",
    }  # fmt: skip


def _dataset(data: Data, repeats: int, **columns: Callable[[int], Any]) -> Any:
    from datasets import Dataset

    rows = [
        {name: make(number) for name, make in columns.items()}
        for _ in range(repeats)
        for number in range(len(data.prompts))
    ]
    return Dataset.from_list(rows)


def _prompt(data: Data) -> Callable[[int], Any]:
    return lambda number: [{"role": "user", "content": data.prompts[number]}]


def _reward(data: Data) -> Callable[..., list[float]]:
    def reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float(row % data.group < NUM_RIGHT) for row in range(len(completions))]

    return reward


def _distillation(case: dict[str, Any], data: Data, load: Any, tokenizer: Any, callbacks: Any) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**_options(case, data), max_completion_length=case["answer"], beta=1.0)
    rows = _dataset(data, 64 * data.group, prompt=_prompt(data))
    return DistillationTrainer(
        load("student"), load("teacher"), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )


def _with_messages(trainer: Any, config: Any, **options: Any) -> Any:
    def make(case: dict[str, Any], data: Data, load: Any, tokenizer: Any, callbacks: Any) -> Any:
        longest = case["prompt"] + case["answer"] + 64
        limit = "max_completion_length" if hasattr(config, "max_completion_length") else "max_new_tokens"
        args = config(
            **_options(case, data), lmbda=1.0, beta=1.0, temperature=1.0, max_length=longest, **options,
            **{limit: case["answer"]},
        )  # fmt: skip
        messages = lambda number: [*_prompt(data)(number), {"role": "assistant", "content": data.solutions[number]}]  # noqa: E731
        rows = _dataset(data, 64 * data.group, messages=messages)
        return trainer(
            model=load("student"), teacher_model=load("teacher"), args=args, train_dataset=rows,
            processing_class=tokenizer, callbacks=callbacks,
        )  # fmt: skip

    return make


def _gkd(*given: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return _with_messages(GKDTrainer, GKDConfig)(*given)


def _gold(*given: Any) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    return _with_messages(GOLDTrainer, GOLDConfig, use_uld_loss=False)(*given)


def _grpo(case: dict[str, Any], data: Data, load: Any, tokenizer: Any, callbacks: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **_options(case, data), max_completion_length=case["answer"], num_generations=data.group, beta=0.0
    )
    rows = _dataset(data, 64, prompt=_prompt(data))
    return GRPOTrainer(
        load("student"), _reward(data), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )


TOPK = {"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True,
        "distillation_is_clip": None, "teacher_model_kind": "ema"}  # fmt: skip


def _sdft(case: dict[str, Any], data: Data, load: Any, tokenizer: Any, callbacks: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        **_options(case, data), **TOPK, max_completion_length=case["answer"], num_generations=data.group,
        distillation_alpha=1.0, teacher_prompt_template="({privileged_context}){prompt}",
    )  # fmt: skip
    rows = _dataset(data, 64, prompt=_prompt(data), privileged_context=lambda number: data.solutions[number])
    return SDFTTrainer(
        str(data.folder / "student"), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )


def _sdpo(case: dict[str, Any], data: Data, load: Any, tokenizer: Any, callbacks: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    args = SDPOConfig(
        **_options(case, data), **TOPK, max_completion_length=case["answer"], num_generations=data.group,
        distillation_alpha=0.5, reprompt_template="{prompt}{solution}{feedback}" + CLOSING,
        solution_template=SUCCESS.format("{successful_previous_attempt}"),
    )  # fmt: skip
    rows = _dataset(data, 64, prompt=_prompt(data))
    return SDPOTrainer(
        str(data.folder / "student"), _reward(data), args=args, train_dataset=rows, processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip


TRAINERS: dict[str, Callable[..., Any]] = {
    "distillation": _distillation, "gkd": _gkd, "gold": _gold, "sdpo": _sdpo, "sdft": _sdft, "grpo": _grpo,
}  # fmt: skip
