"""Keys of the verl trainer that are none of ours: what moves its numbers and what does not. A key in neither table is
not known, and reported as such: its effect cannot be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MOVES = "CHANGES RESULTS there"
UNKNOWN = "no key that opdkit knows: it may change results there"

_REWARDS = "rewards come from data.task: write yours as a task of your own (docs/guides/rewards.md)"
_TOOLS = "nothing says in which environment: write [episode] yourself (docs/guides/agents.md)"
_OVERLONG = 'a "length" term of a weighted task is DAPO\'s overlong penalty (docs/guides/rewards.md)'

# Key -> (values that mean what happens here, what to do about others).
_UNLESS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "actor.entropy_coeff": ((0,), "no loss here has an entropy bonus"),
    "actor.loss_scale_factor": ((None,), "choose method.reduction"),
    "actor.ppo_epochs": ((1,), "a batch is read once"),
    "actor.tis_imp_ratio_cap": ((None, -1, 0), "choose weights.importance"),
    "actor.optim.lr_warmup_steps_ratio": ((None, 0, -1), "choose train.warmup_steps"),
    "actor.optim.min_lr_ratio": ((None, 0), "the learning rate falls to 0 here"),
    "actor.optim.num_cycles": ((None, 0.5), "the learning rate falls once, to 0"),
    "actor.optim.optimizer": ((None, "AdamW"), "choose train.optimizer"),
    "actor.optim.total_training_steps": ((None, -1, 0), "the schedule ends with train.steps"),
    "algorithm.use_kl_in_reward": ((False,), "a reward here is the grader's alone; method.kl_weight is a term of grpo"),
    "algorithm.use_pf_ppo": ((None, False), "no answers are weighed like this here"),
    "data.prompt_key": ((None, "prompt"), "name the column with --set data.columns.prompt=COLUMN"),
    "data.reward_fn_key": ((None, "data_source"), "data.task grades all rows"),
    "data.shuffle": ((None, True), "problems are shuffled by the seed here"),
    "data.tool_config_path": ((None, ""), _TOOLS),
    "data.train_max_samples": ((None, -1), "choose data.limit"),
    "data.truncation": ((None, "error"), "a prompt over data.max_prompt_tokens leaves the data here; none is cut"),
    "data.use_chat_template": ((None, True), 'choose model.chat_template, e.g. "plain"'),
    "data.val_max_samples": ((None, -1), "choose eval.limit"),
    "model.external_lib": ((None, ""), "no code of a configuration is run"),
    "model.lora_adapter_path": ((None,), "merge the adapter, or give its folder as model.path"),
    "model.tokenizer_path": ((None, ""), "the tokenizer is read from model.path"),
    "model.custom_chat_template": ((None, ""), "write it to a file and name that as model.chat_template"),
    "reward_model.reward_manager": ((None, "naive", "batch"), f"{_REWARDS}; {_OVERLONG}"),
    "reward.reward_manager.name": ((None, "naive", "batch"), f"{_REWARDS}; {_OVERLONG}"),
    "rollout.agent.agent_loop_config_path": ((None, ""), _TOOLS),
    "rollout.agent.default_agent_loop": ((None, "", "single_turn_agent"), _TOOLS),
    "rollout.do_sample": ((True,), "choose sampling.temperature"),
    "rollout.frequency_penalty": ((None, 0), "no such penalty is sampled with here"),
    "rollout.ignore_eos": ((None, False), "an answer ends with its stop token here"),
    "rollout.multi_turn.interaction_config_path": ((None, ""), _TOOLS),
    "rollout.multi_turn.tool_config_path": ((None, ""), _TOOLS),
    "rollout.presence_penalty": ((None, 0), "no such penalty is sampled with here"),
    "rollout.quantization": ((None,), "answers are sampled in the student's own precision"),
    "rollout.repetition_penalty": ((None, 1), "no such penalty is sampled with here"),
    "rollout.stop": ((None, [], ""), "an answer ends with its stop token here"),
    "rollout.use_fire_sampling": ((None, False), "the first token is sampled as the others are"),
    "rollout.val_kwargs.do_sample": ((True,), "evaluation is greedy there: choose eval.temperature"),
}  # fmt: skip

# Keys that begin like this count where another key switches them on; what to do about them.
_IF_ON: Mapping[str, tuple[str, str]] = {
    "algorithm.filter_groups.": ("algorithm.filter_groups.enable", "no groups are left out and sampled again here"),
    "algorithm.kl_ctrl.": ("algorithm.use_kl_in_reward", "a reward here is the grader's alone"),
    "custom_reward_function.": ("custom_reward_function.path", _REWARDS),
    "data.custom_cls.": ("data.custom_cls.path", "no code of a configuration is run: write its rows as a file"),
    "data.datagen.": ("data.datagen.path", "no code of a configuration is run: write its rows as a file"),
    "data.sampler.": ("data.sampler.class_path", "problems are shuffled by the seed here"),
    "reward.custom_reward_function.": ("reward.custom_reward_function.path", _REWARDS),
    "reward.reward_model.": ("reward.reward_model.enable", "no reward model is read here"),
    "reward_model.overlong_buffer.": ("reward_model.overlong_buffer.enable", _OVERLONG),
    "reward_model.reward_kwargs.": ("reward_model.reward_manager", _OVERLONG),
    "reward_model.sandbox_fusion.": ("reward_model.sandbox_fusion.url", "programs run in opdkit's own sandbox"),
    "reward_model.": ("reward_model.enable", "no reward model is read here"),
    "rollout.multi_turn.": ("rollout.multi_turn.enable", _TOOLS),
}

# Repeated under a second name; another value than the first one's moves numbers.
_SAME_AS = {"rollout.response_length": "data.max_response_length", "rollout.prompt_length": "data.max_prompt_length"}

# Patterns of keys that move nothing, or nothing that this run has; why.
_LEFT_OUT: Mapping[str, str] = {
    r"trainer\.total_epochs": "a recipe counts optimizer steps: train.steps",
    r"(trainer|ray_\w*|global_profiler|transfer_queue|profiler)\..*|hybrid_engine|nccl_timeout":
        "of the launcher and its cluster; opdkit runs in one process",
    r"rollout\.(_target_|name|mode|dtype|gpu_mem\w*|\w*parallel_size|max_num_\w+|max_model_len|enforce_eager"
    r"|free_cache_engine|load_format|layered_summon|enable_\w+|disable_log_\w+|log_prob_\w+|logprobs_mode"
    r"|calculate_log_probs|cudagraph_\w+|update_weights_\w+|skip_\w+|over_sample_rate|multi_stage_wake_up|limit_images"
    r"|scheduling_policy|nnodes|n_gpus_per_node|agent\.(num_workers|_target_)|val_kwargs\._target_"
    r"|(engine_kwargs|trace|prometheus|profiler|checkpoint_engine|server)\..*)":
        "of the vLLM engine; opdkit samples with its own",
    r"ref\.(?!model\.).*": "of how the reference is spread over devices",
    r"critic\..*": "no method here has a critic",
    r"reward_model\.(strategy|style|launch_reward_fn_async|num_workers|num_examine|use_reward_loop|_target_)"
    r"|reward\.num_workers": "of how rewards are spread over processes",
    r"algorithm\.(gamma|lam|kl_penalty|_target_|pf_ppo\..*)": "of estimators that this run does not use",
    r"actor\.fsdp_config\..*": "of how the model is spread over devices; master weights are float32 here",
    r"actor\.(_target_|strategy|use_dynamic_bsz|ppo_max_token_len_per_gpu|ppo_micro_batch_size|ulysses_\w+"
    r"|use_torch_compile|entropy_\w*(chunking|checkpointing)|calculate_\w+|use_fused_kernels|use_remove_padding|shuffle"
    r"|data_loader_seed|rollout_n|ppo_infer_\w+|load_weight|freeze_vision_tower|optim\._target_"
    r"|(checkpoint|profiler|profile|megatron|veomni)\..*)":
        "of how a batch is cut and spread; it changes no number here",
    r"model\.(_target_|use_\w+|enable_activation_offload|fused_kernel_options\..*|hf_config_path|exclude_modules)":
        "of how the model is spread over devices",
    r"data\.(_target_|dataloader_\w+|filter_overlong_\w+|return_\w+|val_batch_size|gen_batch_size|validation_shuffle"
    r"|cache_dir|use_shm|trust_remote_code|tokenizer|image_\w+|video_\w+)":
        "of the loader; data are read whole, shuffled by the seed, and checked",
    r"hydra\..*|defaults": "of Hydra",
}  # fmt: skip


def why_left_out(key: str, value: Any, known: Mapping[str, Any]) -> str | None:
    """What is said of a key that has no counterpart here; None: it is not known. known: all of the file's."""
    if key in _UNLESS:
        neutral, way_out = _UNLESS[key]
        return "as here" if value in neutral else f"{MOVES}: {way_out}"
    if key in _SAME_AS:
        first = known.get(_SAME_AS[key])
        same = value is None or value == first or (isinstance(value, str) and "$" in value)
        return f"as {_SAME_AS[key]}" if same else f"{MOVES}: {_SAME_AS[key]} is {first!r}, and is what was taken over"
    if why := next((why for pattern, why in _LEFT_OUT.items() if re.fullmatch(pattern, key)), None):
        return why
    for start, (switch, way_out) in _IF_ON.items():
        if key.startswith(start):
            is_on = known.get(switch) not in (None, False, "", 0, "naive")
            return f"{MOVES}: {way_out}" if is_on else "of a part that is off"
    return None
