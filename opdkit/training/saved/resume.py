"""What a continued run may change about itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from opdkit.contexts.text import digest_of
from opdkit.data.readers import Dataset
from opdkit.engines.load import model_digest
from opdkit.errors import UserError
from opdkit.hub import commit_of
from opdkit.metric_lines import of_steps, read_metrics
from opdkit.recipe import Recipe, parse_recipe
from opdkit.recipe.build import flat
from opdkit.recipe.sentinels import SentinelsSection
from opdkit.run.folder import RunFolder
from opdkit.run.sums import changed as changed_files
from opdkit.training.saved import checkpoint

# Memory and place: the same numbers, but for what another order of additions does to them.
LAST_BITS = (
    "train.max_tokens_per_micro_batch",
    "train.max_tokens_per_scoring_pass",
    "train.fixed_tokens_per_pass",
    "train.share_prefixes",
    "sampling.max_tokens_per_batch",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "model.device",
    "teacher.device",
    "teacher.weights_on",
    "sampling.vllm.tensor_parallel_size",
    "sampling.vllm.ranks_per_engine",
    "parallel.strategy",
    "parallel.hsdp",
    "parallel.offload",
)
# Nothing else that moves a number that is already on disk, or to come.
CHANGEABLE = (
    *LAST_BITS,
    "name",  # the run's folder may have been moved
    "runs_dir",
    "sampling.url",
    "sampling.when_idle",
    "sampling.vllm.python",
    "sampling.vllm.gpu_memory_utilization",
    "train.save_every",
    "train.keep_checkpoints",
    "train.save_in_background",
    "train.save_rows_every",
    "train.keep_best",
    "train.stop_when",
    "train.average_last",
    "spool.max_gib",
    "eval.every",
    "log.sinks",
    "log.project",
    "parallel.timeout_minutes",
    "episode.workers",  # a row depends on nobody that it is played with
    "diagnostics.every",
    "diagnostics.rows",
    "diagnostics.k",
    "diagnostics.bucket_tokens",
    # Whoever is told that a run goes wrong may want something else to be done from here on.
    *(f"sentinels.{key}" for key in SentinelsSection.model_fields),
)


# Of any teacher: where it is and how it is asked. What it says is probed, and its model's files are compared.
_OF_TEACHERS = ("url", "served_name", "spool", "at_once", "patience_s", "timeout_s", "placement")


def _is_place_of_teacher(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in _OF_TEACHERS and (
        section == "teacher" or (section.startswith("views.") and section.endswith(".teacher"))
    )


def check_same_recipe(
    old: Mapping[str, Any], new: Mapping[str, Any], *, steps_taken: int, same_models: Collection[str] = ()
) -> dict[str, Any]:
    """What is another value now: {key: [was, is]}. Raises UserError naming every key in which a resumed run would be
    another run than the one it continues.

    `train.steps` may change where neither the learning rate nor a [schedule] depends on it: a longer run is what it
    would have been. same_models: keys of models whose path may be another one, since their files are the same.
    """
    was, now = flat(old), flat(new)
    same_when_longer = now["train.schedule"] == "constant" and "schedule" not in new
    changeable = {*CHANGEABLE, *same_models, *(["train.steps"] if same_when_longer else [])}
    changed = {key: [was.get(key), now.get(key)] for key in sorted({*was, *now}) if was.get(key) != now.get(key)}
    differ = [
        f"{key} was {values[0]!r}, is {values[1]!r}"
        for key, values in changed.items()
        if key not in changeable and not _is_place_of_teacher(key)
    ]
    if now["train.steps"] < steps_taken:
        differ.append(f"train.steps is {now['train.steps']}, and {steps_taken} are taken")
    if differ:
        raise UserError(
            f"--resume continues a run with its own recipe, but {'; '.join(differ)}; "
            "undo that, or start a run of another name"
        )
    return changed


def last_bits(changed: Mapping[str, Any]) -> list[str]:
    """A sentence for what was changed and moves last bits."""
    said = [f"{key} (was {changed[key][0]!r}, is {changed[key][1]!r})" for key in LAST_BITS if key in changed]
    if not said:
        return []
    return [
        f"resumed with another {', '.join(said)}: sums are taken in another order, so from here on the last bits, and "
        "with them now and then a sampled token, may differ from those of an uninterrupted run"
    ]


def going_on(folder: RunFolder, recipe: Recipe) -> tuple[checkpoint.Saved | None, dict[str, Any], list[str]]:
    """The checkpoint that a resumed run goes on from, the keys that are other ones than its recipe's, and what has to
    be said about either. Raises UserError where it cannot go on."""
    saved = checkpoint.latest(folder.checkpoints)
    step = saved.step if saved else 0
    models = {key: path for key, path in recipe.model_paths.items() if _same_files(folder, key, path)}
    began = _with_todays_keys(folder.read_recipe())
    changed = check_same_recipe(began, recipe.as_dict(), steps_taken=step, same_models=models)
    said = [*(checkpoint.set_aside(saved) if saved else ()), *last_bits(changed), *changed_files(folder.path)]
    lines = of_steps(read_metrics(folder.metrics)) if folder.metrics.exists() else []
    kept = sum(line["step"] <= step for line in lines)
    if kept < step:
        said.append(f"{folder.metrics} has lost lines: {step} steps were taken, and it has {kept} of them")
    return saved, changed, said


def _with_todays_keys(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run of an earlier opdkit has none of the keys that came later: it ran with what are their defaults."""
    try:
        return parse_recipe(recipe).as_dict()
    except UserError:  # a file that it names is gone, say: then every key must be there
        return recipe


def _same_files(folder: RunFolder, key: str, path: str) -> bool:
    """Whether the model at `path` is the one the run began with, whatever its path was then."""
    began = folder.read_environment().get("models", {}).get(key) if folder.environment.exists() else None
    return began is not None and began == model_digest(Path(path))


def commits_of(folder: RunFolder, recipe: Recipe, *, is_resumed: bool) -> dict[str, str]:
    """Of the recipe's models that come from a hub, by name: at which commit this run reads them, from its first load
    to its last resumption. A model whose commit cannot be found out is left out."""
    known = folder.read_environment().get("commits", {}) if is_resumed and folder.environment.exists() else {}
    names = dict.fromkeys(path for path in recipe.model_paths.values() if not Path(path).is_dir())
    found = {name: known.get(name) or commit_of(name) for name in names}
    return {name: str(commit) for name, commit in found.items() if commit}


def fingerprints(
    recipe: Recipe, train: Dataset, eval_sets: Mapping[str, Dataset], models: Mapping[str, str | None]
) -> dict[str, str]:
    """What a resumed run must find as it was: data as loaded, and weights that checkpoints do not hold.

    models: the digests of the recipe's.
    """
    sets = {f"data.train {name}": part for name, part in train.parts.items()} or {train.source: train}
    prints = {source: data.fingerprint for source, data in {**sets, **eval_sets}.items()}
    prints |= recipe.user_files
    prints |= {key: digest_of(path) for key, path in recipe.context_files.items()}
    own = None if recipe.model.lora else "model.path"  # checkpoints hold it
    return prints | {path: digest for key, path in recipe.model_paths.items() if (digest := models[key]) and key != own}
