"""`opdkit import-config`: what published configurations become, and that no key is passed over."""

from __future__ import annotations

import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.contexts import CONTEXTS
from opdkit.errors import UserError
from opdkit.recipe import load_recipe, parse_recipe
from opdkit.recipe.imported import read_settings, translate

LAUNCHER = r"""#!/bin/bash
# MOPD's launcher, in its manner. $UNUSED is set nowhere.
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-4B}
LR=1e-5
python -m verl.trainer.main_ppo --config-name sdpo data.train_files=deepmath.parquet \
    data.train_batch_size=32 data.max_response_length=4096 actor_rollout_ref.model.path=$MODEL_PATH \
    actor_rollout_ref.actor.optim.lr=$LR actor_rollout_ref.actor.optim.lr_warmup_steps=10 \
    actor_rollout_ref.actor.optim.weight_decay=0.01 \
    actor_rollout_ref.actor.self_distillation.include_another_solution=True \
    actor_rollout_ref.actor.self_distillation.include_failure_solution=True \
    actor_rollout_ref.actor.self_distillation.failure_solution_condition=always \
    actor_rollout_ref.rollout.n=8 +actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16 \
    trainer.total_training_steps=200 trainer.logger="['console','wandb']" trainer.experiment_name='mopd $UNUSED'
"""
DISTILLATION = "actor_rollout_ref.actor.self_distillation."
BASE: dict[str, Any] = {
    "actor_rollout_ref.model.path": "m",
    "data.train_files": "tooluse/train.parquet",
    "trainer.total_training_steps": 30,
    "trainer.experiment_name": "x",
}


def recipe_of(**settings: Any) -> Any:
    """The validated recipe of BASE and these self-distillation settings."""
    keys = {DISTILLATION + key: value for key, value in ({"alpha": 0.5} | settings).items()}
    return parse_recipe(translate(BASE | keys).recipe)


def test_a_launcher_becomes_the_methods_defaults(tmp_path: Path) -> None:
    """MOPD's script says what our `mopd` is by default, but for the published threshold 0.5."""
    script = tmp_path / "mopd.sh"
    script.write_text(LAUNCHER)
    done = CliRunner().invoke(app, ["import-config", str(script)])
    assert done.exit_code == 0, done.output
    got = load_recipe(tmp_path / "mopd.toml")
    keys = {"name": "mopd", "model": {"path": "Qwen/Qwen3-4B"}, "log": {"sinks": ["wandb"]}, "seed": 42}
    keys |= {"data": {"train": "deepmath.parquet", "task": "math"}, "train": {"steps": 200}, "method": {"name": "mopd"}}
    wanted = parse_recipe({**keys, "context": {"success_threshold": 0.5}})
    assert got.as_dict() == wanted.as_dict()
    assert "fsdp_config.model_dtype = bfloat16" in done.output and "left out" in done.output


@pytest.mark.parametrize("mode", ["sdpo", "grpo", "dpo", "simpo", "sft"])
def test_no_key_is_passed_over(mode: str) -> None:
    """Keys of parts that are off, and of other losses, have their line too, whatever the method."""
    actor = {
        "use_kl_loss": True,
        "kl_loss_coef": 0.01,
        "kl_loss_type": "low_var_kl",
        "clip_ratio": 0.3,
        "ppo_epochs": 1,
    }
    actor |= {"policy_loss.loss_mode": mode, "policy_loss.foo": 1, "loss_agg_mode": "token-mean", "entropy_coeff": 0.1}
    own = {"summary_k": 4, "peer_control_match": "block", "full_logit_distillation": False, "distillation_topk": 5}
    keys = {f"actor.{key}": value for key, value in actor.items()}
    keys |= {f"actor.self_distillation.{key}": value for key, value in own.items()}
    keys |= {"algorithm.norm_adv_by_std_in_grpo": False, "ref.model.path": "m", "model.lora_alpha": 32}
    keys |= {"algorithm.rollout_correction.rollout_is": "token"}
    lines = {line.key: line for line in translate(keys).lines}
    assert set(keys) <= set(lines)
    assert "CHANGES RESULTS" in lines["actor.entropy_coeff"].note
    assert mode == "grpo" or "no KL to a reference" in lines["actor.use_kl_loss"].note


def test_an_adapter_stays_an_adapter() -> None:
    """A rank makes LoRA, with the trainer's own alpha; rank 0 makes none."""
    lora = parse_recipe(translate(BASE | {"actor_rollout_ref.model.lora_rank": 32}).recipe).model.lora
    assert lora is not None and (lora.r, lora.alpha, lora.target_modules) == (32, 16, "all-linear")
    assert parse_recipe(translate(BASE | {"model.lora_rank": 0, "model.lora_alpha": 8}).recipe).model.lora is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("self_distillation.alpha", "abc", "alpha = 'abc' is not a number"),
        ("self_distillation.teacher_update_rate", None, "is not a number"),
        ("self_distillation.include_failure_solution", "false", "is not true or false"),
        ("self_distillation.peer_control_mode", ["a"], "is not a word"),
        ("self_distillation.teacher_regularization", "hard", "'hard' has no counterpart"),
        ("policy_loss.loss_mode", ["sdpo"], "has no counterpart"),
        ("clip_ratio", "abc", "'abc' cannot be method.clip_low"),
    ],
)
def test_values_of_another_type_are_refused(key: str, value: Any, said: str) -> None:
    """Not read as something else, and no traceback."""
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        translate(BASE | {f"actor_rollout_ref.actor.{key}": value})


def test_every_key_has_its_line() -> None:
    """Also those that mean nothing here, and those nobody knows."""
    odd = {"actor_rollout_ref.actor.self_distillation.alfa": 1, "trainer.nnodes": 4, "my.own": 2, "data.shuffle": True}
    lines = {line.key: line for line in translate(BASE | odd).lines}
    assert {"model.path", "data.train_files", "trainer.total_training_steps", "trainer.experiment_name"} <= set(lines)
    assert lines["actor.self_distillation.alfa"].fate == lines["my.own"].fate == "not known"
    assert lines["trainer.nnodes"].fate == lines["data.shuffle"].fate == "left out"
    assert all(line.note for line in lines.values() if line.fate in ("left out", "not known"))


@pytest.mark.parametrize(
    ("alpha", "divergence", "scale"),
    [(0, "forward_kl", "continuous"), (1, "reverse_kl", "continuous"), (0.3, "jsd", "published")]
)  # fmt: skip
def test_alpha_in_words(alpha: float, divergence: str, scale: str) -> None:
    method = recipe_of(alpha=alpha).method
    assert (method.divergence, method.jsd_scale) == (divergence, scale)
    assert method.teacher_share == (0.3 if alpha == 0.3 else None)


def test_supports_and_tails() -> None:
    assert (recipe_of(distillation_topk=None).method.support, recipe_of().method.k) == ("full", 100)
    assert recipe_of(distillation_add_tail=False).method.tail == "renormalise"
    sampled = recipe_of(full_logit_distillation=False, alpha=1).method
    assert (sampled.support, sampled.divergence) == ("sampled", "reverse_kl")


def test_teachers() -> None:
    """EMA, frozen at rate 0, a mixture of logits, another model."""
    assert recipe_of(teacher_update_rate=0.01).teacher.ema_rate == 0.01
    assert recipe_of(teacher_update_rate=0).teacher.weights == "initial"
    mixed = recipe_of(teacher_regularization="trust-region", teacher_update_rate=0.1).teacher
    assert (mixed.weights, mixed.student_share) == ("trust_region", 0.1)
    settings = BASE | {"actor_rollout_ref.ref.model.path": "big", DISTILLATION + "teacher_update_rate": 0}
    assert parse_recipe(translate(settings).recipe).teacher.path == "big"


def test_contexts() -> None:
    """Slots, feedback, summaries, controls; the published choices only with `parity`."""
    context = recipe_of(include_primary_solution=False, include_another_solution=True).context
    assert (context.slots, context.order) == (("hidden_success", "success"), "seeded")
    assert recipe_of(include_environment_feedback=False).context.feedback == "never"
    summaries = recipe_of(summarize_solutions=True, summary_k=7, summary_from_all=True).context.summaries
    assert (summaries.count, summaries.of) == (7, "all")
    assert (
        recipe_of(peer_control_mode="success_only_matched", include_failure_solution=True).context.control.kind
        == "success_only"
    )
    keys = {DISTILLATION + "alpha": 0.5}
    exact = parse_recipe(translate(BASE | keys, parity=True).recipe)
    assert (exact.context.order, exact.method.without_context) == ("published", "dilute")
    assert isinstance(exact.context, CONTEXTS["peers"])


def test_baselines() -> None:
    """GRPO as MOPD runs it, SimPO; the task from the data's name."""
    grpo = BASE | {
        "actor_rollout_ref.actor.clip_ratio_low": 0.2,
        "actor_rollout_ref.actor.clip_ratio_high": 0.28,
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.n": 8,
    }
    recipe = parse_recipe(translate(grpo).recipe)
    method: Any = recipe.method
    assert (method.clip_high, method.dual_clip, method.advantage_std, method.reduction) == (0.28, 3.0, "none", "token")
    assert recipe.data.task.name == "tool_use"
    keys = {"actor.policy_loss.loss_mode": "simpo", "actor.policy_loss.simpo_gamma": 0.5, "rollout.n": 8}
    simpo: Any = parse_recipe(translate(BASE | keys).recipe).method
    assert (simpo.name, simpo.margin, simpo.beta) == ("simpo", 0.5, 2.0)


def test_mini_batches() -> None:
    """Updates on one batch; only then does the published cap act, and the sampler is corrected for once."""
    batch = {
        "data.train_batch_size": 32,
        DISTILLATION + "alpha": 0.5,
        "algorithm.rollout_correction.rollout_is": "token",
    }
    one = parse_recipe(translate(BASE | batch | {"actor.ppo_mini_batch_size": 32}).recipe)
    several = parse_recipe(translate(BASE | batch | {"actor.ppo_mini_batch_size": 8}).recipe)
    assert (one.train.updates_per_step, one.method.importance_cap, one.weights.importance.cap) == (1, None, 2.0)
    assert (several.train.updates_per_step, several.method.importance_cap, several.weights.importance) == (4, 2.0, None)
    odd = translate(BASE | batch | {"actor.ppo_mini_batch_size": 5})
    assert "choose train.updates_per_step" in {line.key: line.note for line in odd.lines}["actor.ppo_mini_batch_size"]


def test_yaml_and_json_nest(tmp_path: Path) -> None:
    """The same settings from both, `1e-5` a number in each; a section alone is read as if it stood in its place."""
    nested = {"actor_rollout_ref": {"actor": {"optim": {"lr": "1e-5"}}}, "data": {"seed": 7}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(nested))
    (tmp_path / "b.json").write_text('{"actor_rollout_ref": {"actor": {"optim": {"lr": 1e-5}}}, "data": {"seed": 7}}')
    got = read_settings(tmp_path / "a.yaml")
    assert got == read_settings(tmp_path / "b.json") == {"actor_rollout_ref.actor.optim.lr": 1e-5, "data.seed": 7}
    assert recipe_of().as_dict() == parse_recipe(translate(BASE | {"self_distillation.alpha": 0.5}).recipe).as_dict()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.yaml", "", "is no table of settings"),
        ("broken.yaml", "a: [1", "not valid YAML"),
        ("empty.sh", "echo hello", "holds no settings"),
        ("quotes.sh", "data.seed='4", "quotes cannot be read"),
        ("mode.yaml", "actor: {policy_loss: {loss_mode: gspo}}", "'gspo' has no counterpart"),
        ("short.yaml", "data: {seed: 3}", "does not say model.path, data.train, train.steps"),
    ],
)
def test_refusals(tmp_path: Path, name: str, text: str, said: str) -> None:
    """One sentence, and no recipe."""
    (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["import-config", str(tmp_path / name)])
    assert isinstance(done.exception, UserError) and said in str(done.exception)
    assert not list(tmp_path.glob("*.toml"))


def test_nothing_is_overwritten_or_run(tmp_path: Path) -> None:
    """A recipe that is there stays; a script's commands are text."""
    script = tmp_path / "run.sh"
    script.write_text(f"touch {tmp_path}/ran\nX=$(touch {tmp_path}/ran)\n{LAUNCHER}")
    (tmp_path / "run.toml").write_text("mine")
    refused = CliRunner().invoke(app, ["import-config", str(script)])
    assert isinstance(refused.exception, UserError) and (tmp_path / "run.toml").read_text() == "mine"
    assert CliRunner().invoke(app, ["import-config", str(script), "--overwrite"]).exit_code == 0
    assert tomllib.loads((tmp_path / "run.toml").read_text())["train"]["steps"] == 200
    assert not (tmp_path / "ran").exists()


ON_AND_OFF = [  # settings that move numbers, and the same key where it does not
    ({"rollout.multi_turn.enable": True, "rollout.multi_turn.max_turns": 5}, {"rollout.multi_turn.enable": False}),
    ({"rollout.multi_turn.tool_config_path": "t.yaml"}, {"rollout.multi_turn.tool_config_path": None}),
    ({"data.tool_config_path": "t.yaml"}, {"data.tool_config_path": None}),
    ({"rollout.agent.default_agent_loop": "tool_agent"}, {"rollout.agent.default_agent_loop": "single_turn_agent"}),
    ({"custom_reward_function.path": "r.py"}, {"custom_reward_function.path": None}),
    ({"reward.custom_reward_function.path": "r.py"}, {"reward.custom_reward_function.path": ""}),
    ({"reward_model.enable": True, "reward_model.model.path": "rm"}, {"reward_model.enable": False}),
    ({"reward_model.reward_manager": "dapo"}, {"reward_model.reward_manager": "naive"}),
    ({"reward_model.overlong_buffer.enable": True}, {"reward_model.overlong_buffer.enable": False}),
    ({"algorithm.filter_groups.enable": True}, {"algorithm.filter_groups.enable": False}),
    ({"data.custom_cls.path": "d.py"}, {"data.custom_cls.path": None}),
    ({"data.truncation": "left"}, {"data.truncation": "error"}),
    ({"data.shuffle": False}, {"data.shuffle": True}),
    ({"actor.ppo_epochs": 2}, {"actor.ppo_epochs": 1}),
    ({"rollout.response_length": 9}, {"rollout.response_length": "${data.max_response_length}"}),
]  # fmt: skip


@pytest.mark.parametrize(("on", "off"), ON_AND_OFF)
def test_what_moves_numbers_is_said(on: dict[str, Any], off: dict[str, Any]) -> None:
    """Several turns, tools, rewards of one's own, and the like: CHANGES RESULTS where they are on, and only there."""
    lines = {line.key: line for line in translate(BASE | on).lines}
    assert all(lines[key].fate == "left out" and "CHANGES RESULTS there: " in lines[key].note for key in on)
    lines = {line.key: line for line in translate(BASE | off).lines}
    assert all(lines[key].fate == "left out" and "CHANGES RESULTS" not in lines[key].note for key in off)


def test_several_turns_become_an_episode() -> None:
    """verl's tool agent; what means something else here says so."""
    keys = {
        "enable": True, "max_assistant_turns": 6, "max_user_turns": 5, "max_parallel_calls": 2, "format": "hermes",
        "max_tool_response_length": 256, "tool_response_truncate_side": "middle", "tool_config_path": "tools.yaml",
        "tokenization_sanity_check_mode": "strict", "interaction_config_path": None, "new_key": 3,
    }  # fmt: skip
    length = {"data.max_response_length": 512}
    imported = translate(BASE | length | {f"rollout.multi_turn.{key}": value for key, value in keys.items()})
    assert imported.recipe["episode"] == {
        "environment": {"name": "verl", "config": "tools.yaml"}, "max_turns": 5, "max_calls_per_turn": 2,
        "max_observation_tokens": 256, "calls": "hermes", "max_episode_tokens": 512,
    }  # fmt: skip
    notes = {line.key.rpartition(".")[2]: line.note for line in imported.lines}
    moving = {key for key in keys if "CHANGES RESULTS" in notes[key]}
    assert moving == {"max_tool_response_length", "tool_response_truncate_side", "new_key"}
    functions = {"rollout.multi_turn.enable": True, "rollout.multi_turn.function_tool_path": "t.py"}
    assert translate(BASE | functions).recipe["episode"]["environment"] == "t.py:TOOLS"
    assert "episode" not in translate(BASE | {"rollout.multi_turn.tool_config_path": "tools.yaml"}).recipe


@pytest.mark.parametrize("section", ["rollout", "actor", "data", "model", "algorithm", "reward", "actor.optim"])
def test_a_key_nobody_knows_is_not_said_to_be_harmless(section: str) -> None:
    """In any section of the trainer."""
    (line,) = (line for line in translate(BASE | {f"{section}.new_idea": 3}).lines if line.key.endswith("new_idea"))
    assert line.fate == "not known" and "may change results" in line.note


def test_the_command_says_what_moves_numbers(tmp_path: Path) -> None:
    """Once more at the end, by name; template arguments are taken over."""
    script = tmp_path / "run.sh"
    script.write_text(f"{LAUNCHER.rstrip()} rollout.multi_turn.enable=True data.apply_chat_template_kwargs.mode=x\n")
    done = CliRunner().invoke(app, ["import-config", str(script)])
    assert "1 settings change results there and are left out: rollout.multi_turn.enable" in done.output
    assert load_recipe(tmp_path / "run.toml").model.template_kwargs["mode"] == "x"


def test_a_name_cannot_write_the_recipe(tmp_path: Path) -> None:
    """A file's name stands in a comment: line breaks and colours are escaped, and the recipe's name is a legal one."""
    script = tmp_path / "a\nseed = 7 \x1b[31m\u202e.sh"
    script.write_text(LAUNCHER.replace("trainer.experiment_name='mopd $UNUSED'", ""))
    assert CliRunner().invoke(app, ["import-config", str(script), "--out", str(tmp_path / "r.toml")]).exit_code == 0
    text = (tmp_path / "r.toml").read_text()
    assert text.startswith("# From a\\nseed = 7 \\x1b[31m\\u202e.sh by opdkit") and "seed" not in tomllib.loads(text)
    assert tomllib.loads(text)["name"] == "a-seed-7-31m-"


DOUBLING = "A=aaaaaaaaaa\n" + "A=$A$A$A$A\n" * 40 + "data.seed=$A\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("laughs.yaml", LAUGHS, "its aliases .* come to more than 50,000 values"),
        ("merged.yaml", LAUGHS.replace("[x, x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}"), "its aliases"),
        ("circle.yaml", "a: &a {b: *a}", "its aliases"),
        ("doubling.sh", DOUBLING, "variables come to more than"),
        ("override.sh", f"data.seed='{LAUGHS}'", "holds no settings|does not say"),
        ("large.yaml", "a: 1\n" * 300_000, "as no configuration has"),
        ("deep.yaml", "a: " + "[" * 900 + "]" * 900, "nested too deeply|does not say"),
        ("date.yaml", "a: 2020-99-99", "month must be in"),
        ("utf16.yaml", "a: 1".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_bombs(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    """One sentence within a second, little printed, and no recipe."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    done = CliRunner().invoke(app, ["import-config", str(tmp_path / name)])
    assert isinstance(done.exception, UserError) and re.search(said, str(done.exception)), done.exception
    assert len(done.output) < 20_000 and time.process_time() - started < 5
    assert not list(tmp_path.glob("*.toml"))


def test_one_alias_is_fine(tmp_path: Path) -> None:
    """They are bounded, not forbidden; a byte order mark is none of the first key."""
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfbase: &base {lr: 1e-5}\nactor: {optim: {<<: *base}}\n")
    assert read_settings(tmp_path / "a.yaml") == {"base.lr": 1e-5, "actor.optim.lr": 1e-5}
