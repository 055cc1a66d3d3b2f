"""A pipeline: stages in a row, each of which may read what an earlier one made. TOML in, everything refused up front.

    name = "cold-start"              its folder: <runs_dir>/<name>/, a folder a stage in it
    runs_dir = "runs"

    [paths]                          names for models and data, read as {student} in any string of any stage
    student = "Qwen/Qwen3-1.7B-Base"

    [recipe]                         what every stage that trains has in common; any section of a recipe
    data.task = "math"

    [[stage]]
    name = "answers"                 later stages read its result as {answers}
    kind = "sample"                  opdkit sample; also "evaluate", "make_model", "export" (as those commands), "train"
    model = "Qwen/Qwen3-4B"

    [[stage]]
    name = "sft"
    kind = "train"
    recipe = "sft.toml"              a file, from the pipeline's folder, or a table: [stage.recipe]
    set.model.path = "{student}"     has the last word

The result of a stage is the path that later stages read: a model folder, the JSONL of answers, an evaluation's
result.json. Every path is known before anything runs, so `opdkit check` reads a pipeline as it reads a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opdkit.errors import UserError
from opdkit.recipe.build import sentences
from opdkit.recipe.fields import (
    Section,
    did_you_mean,
)
from opdkit.recipe.load import check_plain, key_values, merge, parse_recipe, read_toml
from opdkit.recipe.rules.whole import check_installed, missing_paths, number_faults, paths_of
from opdkit.recipe.sections import Recipe
from opdkit.recipe.shipped import recipe_file
from opdkit.recipe.stage_kinds import Asked, Evaluate, Export, MakeModel, Sample
from opdkit.tasks.options import resolve_task
from opdkit.tasks.rejection import RULES

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9][A-Za-z0-9._-]*)\}")
_TOP = ("name", "runs_dir", "paths", "recipe", "stage")


Definition = Recipe | Sample | Evaluate | MakeModel | Export
KINDS: Mapping[str, type[Section]] = {
    "train": Recipe,
    "sample": Sample,
    "evaluate": Evaluate,
    "make_model": MakeModel,
    "export": Export,
}


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    kind: str
    does: Definition
    folder: Path
    reads: tuple[str, ...]  # the earlier stages whose results it reads
    is_adapter: bool  # its result is a LoRA adapter

    @property
    def result(self) -> Path:
        """What `{name}` stands for in later stages."""
        match self.does:
            case Recipe():
                return self.folder / "checkpoints" / f"step_{self.does.train.steps:06d}" / "model"
            case Sample():
                return self.folder / "answers.jsonl"
            case Evaluate():
                return self.folder / "result.json"
            case MakeModel() | Export():
                return self.folder / "model"

    def as_dict(self) -> dict[str, Any]:
        """Resolved and complete: what the stage does, but not where it writes."""
        if isinstance(self.does, Recipe):
            return {key: value for key, value in self.does.as_dict().items() if key not in ("name", "runs_dir")}
        return self.does.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True, slots=True)
class Pipeline:
    file: Path
    name: str
    folder: Path
    stages: tuple[Stage, ...]

    def check_installed(self) -> None:
        """Raises UserError for a stage whose `log.sinks` are not installed."""
        for stage in self.stages:
            if isinstance(stage.does, Recipe):
                check_installed(stage.does)

    def missing(self) -> list[tuple[str, str]]:
        """(stage, sentence) for local paths where nothing is, and that no stage makes."""
        made = {str(stage.result) for stage in self.stages}
        said = []
        for stage in self.stages:
            if isinstance(stage.does, Recipe):
                found = missing_paths(paths_of(stage.does))
            elif isinstance(stage.does, Asked):
                found = missing_paths([("model", stage.does.model), ("data", stage.does.data)])
            elif isinstance(stage.does, MakeModel):
                found = missing_paths([("data", stage.does.data)])
            else:
                found = iter(())  # an earlier stage makes it
            said += [(stage.name, f"stage {stage.name}: {sentence}") for path, sentence in found if path not in made]
        return said


def is_pipeline(raw: Mapping[str, Any]) -> bool:
    return "stage" in raw


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read, merge, validate. Raises UserError with one line for every fault of every stage.

    overrides: "STAGE.KEY=VALUE", and "paths.X=...", "recipe.train.steps=..." for what stages have in common.
    """
    path = recipe_file(Path(path))
    raw = read_toml(path)
    if not is_pipeline(raw):
        raise UserError(f"{path} has no [[stage]]: a recipe is run by `opdkit train {path}`")
    faults: list[str] = []
    tables = raw["stage"] if isinstance(raw["stage"], list) else []
    names = [table.get("name") if isinstance(table, Mapping) else None for table in tables]
    faults += [f"{key} is not a key{did_you_mean(key, _TOP, 'keys here')}" for key in raw if key not in _TOP]
    faults += _bad_names(names)
    if faults or not tables:
        faults = faults or ["stage is empty; write one [[stage]] or more"]
        raise UserError(*(f"{path}: {fault}" for fault in faults))
    check_plain(raw, str(path))
    settings = key_values(overrides)
    check_plain(settings, str(path))
    common = _common(path, raw, [str(name) for name in names], settings)
    folder = Path(common["runs_dir"]).expanduser() / common["name"]
    known: dict[str, str] = dict(common["paths"])
    stages: list[Stage] = []
    for table in tables:
        own = {key.partition(".")[2]: v for key, v in settings.items() if key.partition(".")[0] == table["name"]}
        stage = _stage(path, table, own, common["recipe"], folder, known, stages, faults)
        if stage is not None:
            stages.append(stage)
        if stage is not None and isinstance(stage.does, Recipe) and stage.does.train.stop_when:
            faults.append(
                f"stage {stage.name}: train.stop_when ends at a step that is not known before, and later stages read "
                "the last one's model; remove it, and choose train.steps"
            )
        # A stage with faults still has a name that later ones may read: their faults are their own.
        known[table["name"]] = str(stage.result if stage else folder / table["name"])
    if faults:
        raise UserError(*(f"{path}: {fault}" for fault in faults))
    return Pipeline(path, common["name"], folder, tuple(stages))


def _common(path: Path, raw: Mapping[str, Any], names: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """name, runs_dir, paths and recipe, with what --set says of them. Raises UserError."""
    common: dict[str, Any] = {"runs_dir": "runs", "paths": {}, "recipe": {}}
    common |= {key: value for key, value in raw.items() if key != "stage"}
    for key, value in settings.items():
        top, dot, rest = key.partition(".")
        if top in ("paths", "recipe") and dot and isinstance(common[top], Mapping):
            common[top] = merge(common[top], _nested(rest, value))
        elif key in ("name", "runs_dir"):
            common[key] = value
        elif top not in names or not dot:
            choices = [f"{name}.KEY" for name in names] + ["paths.KEY", "recipe.KEY", "name", "runs_dir"]
            bare = top in (*names, "paths", "recipe")
            fault = f"name one of {top}'s keys" if bare else f"{top} is no stage{did_you_mean(top, names)}"
            raise UserError(f"--set {key}: {fault}; settings are {', '.join(choices)}")
    faults = []
    if not isinstance(common.get("name"), str) or not _NAME.fullmatch(common["name"]):
        faults.append(f"name = {common.get('name')!r}: give the pipeline a name of letters, digits, '.', '_' and '-'")
    if not isinstance(common["runs_dir"], str) or not common["runs_dir"]:
        faults.append(f"runs_dir = {common['runs_dir']!r} is no path")
    paths = common["paths"]
    if not isinstance(paths, Mapping) or not all(isinstance(value, str) for value in paths.values()):
        faults.append(f'paths = {paths!r}: write [paths] with NAME = "PATH" lines')
    elif within := sorted(name for name, value in paths.items() if _PLACEHOLDER.search(value)):
        faults.append(f"paths.{within[0]} = {paths[within[0]]!r} names another path; write that one out")
    elif taken := sorted(set(paths) & set(names)):
        faults.append(f"{taken[0]} is the name of a path and of a stage: {{{taken[0]}}} would mean both; rename one")
    if not isinstance(common["recipe"], Mapping):
        faults.append(
            f"recipe = {common['recipe']!r} is no table: [recipe] holds what stages that train have in common"
        )
    if faults:
        raise UserError(*(f"{path}: {fault}" for fault in faults))
    return common


def _bad_names(names: Sequence[Any]) -> list[str]:
    said = []
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not _NAME.fullmatch(name) or "." in name or name in _TOP:
            said.append(f"stage {number}: name = {name!r}; give it one of letters, digits, '_' and '-', not {_TOP!r}")
        elif name in names[: number - 1]:
            said.append(f'stage {number}: an earlier stage is called "{name}" too; rename one')
    return said


def _stage(
    file: Path,
    table: Mapping[str, Any],
    settings: Mapping[str, Any],
    common: Mapping[str, Any],
    folder: Path,
    known: Mapping[str, str],
    before: Sequence[Stage],
    faults: list[str],
) -> Stage | None:
    name, kind, found = table["name"], str(table.get("kind")), list[str]()
    adapters = {str(stage.result) for stage in before if stage.is_adapter}
    reads: list[str] = []
    does: Definition | None = None
    if kind not in KINDS:
        found.append(f"kind = {kind!r}{did_you_mean(kind, KINDS)}")
    elif kind == "train":
        raw = _train_keys(file, table, settings, common, found)
        raw = _filled(raw, known, reads, found)
        if not found:
            does = _recipe({**raw, "name": name, "runs_dir": str(folder)}, adapters, found)
    else:
        keys = {key: value for key, value in table.items() if key not in ("name", "kind")}
        for key, value in settings.items():
            keys = merge(keys, _nested(key, value))
        keys = _filled(keys, known, reads, found)
        does = _definition(KINDS[kind], keys, found)
    if isinstance(does, Export):
        found += _export_faults(does, before)
    faults += [f"stage {name}: {fault}" for fault in found]
    if does is None:
        return None
    earlier = {stage.name for stage in before}
    is_adapter = isinstance(does, Recipe) and (does.model.lora is not None or does.model.path in adapters)
    is_adapter = is_adapter or (isinstance(does, Export) and does.adapter)
    return Stage(name, kind, does, folder / name, tuple(dict.fromkeys(r for r in reads if r in earlier)), is_adapter)


def _export_faults(asked: Export, before: Sequence[Stage]) -> list[str]:
    trained = next((s for s in before if isinstance(s.does, Recipe) and str(s.result) == asked.run), None)
    if trained is None or not isinstance(trained.does, Recipe):
        return [f"run = {asked.run!r} is no earlier stage that trains; write its name in braces"]
    train, said = trained.does.train, []
    step = train.steps if asked.step is None else asked.step
    saved = [
        n for n in range(1, train.steps + 1) if n == train.steps or (train.save_every and n % train.save_every == 0)
    ]
    if step not in saved[-train.keep_checkpoints :]:
        said.append(
            f"step = {step} will not be there: stage {trained.name} keeps the checkpoints of steps "
            f"{', '.join(map(str, saved[-train.keep_checkpoints :][-8:]))} (train.save_every, train.keep_checkpoints)"
        )
    if asked.adapter and not trained.is_adapter:
        said.append(f"adapter = true, and stage {trained.name} trains all weights; remove it")
    return said


def _train_keys(
    file: Path, table: Mapping[str, Any], settings: Mapping[str, Any], common: Mapping[str, Any], faults: list[str]
) -> dict[str, Any]:
    """The stage's recipe as keys: what stages have in common < its file or table < its `set` < --set."""
    if unknown := [key for key in table if key not in ("name", "kind", "recipe", "set")]:
        known = "name, kind, recipe (a file or a table) and set"
        faults.append(f"{unknown[0]} is not a key of a stage that trains; it has {known}")
    own, over = table.get("recipe", {}), table.get("set", {})
    if isinstance(own, str):
        try:
            own = read_toml(file.parent / own)
        except UserError as error:
            faults += error.sentences
            own = {}
    for key, value in (("recipe", own), ("set", over)):
        if not isinstance(value, Mapping):
            faults.append(f"{key} = {value!r} is no table")
            return {}
    for where, said in (("[recipe]", common), ("set", over), ("--set", settings)):
        for key in ("name", "runs_dir"):
            if key in said:
                faults.append(f"{where} {key} is never read: the run is runs_dir/PIPELINE/STAGE; remove it")
    keys = _over(_over(common, own), over)
    for key, value in settings.items():
        keys = _over(keys, _nested(key, value))
    return keys


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`, section by section; a section of another kind or name starts afresh."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            afresh = any(word in value and value[word] != old.get(word) for word in ("kind", "name"))
            merged[key] = value if afresh else _over(old, value)
        else:
            merged[key] = value
    return merged


def _filled(value: Any, known: Mapping[str, str], reads: list[str], faults: list[str]) -> Any:
    """`value` with every {name} in its strings replaced; notes the names."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, known, reads, faults) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, known, reads, faults) for inner in value]
    if not isinstance(value, str):
        return value
    for name in _PLACEHOLDER.findall(value):
        if name in known:
            reads.append(name)
        else:
            faults.append(f"{{{name}}} in {value!r} is no earlier stage and no name of [paths]{_near(name, known)}")
    return _PLACEHOLDER.sub(lambda found: known.get(found[1], found[0]), value)


def _near(name: str, known: Mapping[str, str]) -> str:
    return did_you_mean(name, known) if known else ""


def _recipe(raw: Mapping[str, Any], adapters: Collection[str], faults: list[str]) -> Recipe | None:
    try:
        return parse_recipe(raw, where="", adapters=adapters)
    except UserError as error:
        faults += [sentence.removeprefix(": ") for sentence in error.sentences]
        return None


def _definition(kind: type[Section], keys: Mapping[str, Any], faults: list[str]) -> Definition | None:
    try:
        does = kind.model_validate(keys)
    except ValidationError as error:
        faults += sentences(error, kind)
        return None
    if isinstance(does, Asked):
        try:
            resolve_task(does.task)
        except ValueError as error:
            faults.append(f"task = {does.task!r} {error}")
    if isinstance(does, Asked):
        faults += number_faults({"temperature": does.temperature, "top_p": does.top_p})
    if isinstance(does, Asked) and does.temperature == 0 and does.n > 1:
        faults.append(f"n = {does.n} at temperature = 0 samples the same greedy answer every time; use n = 1")
    if isinstance(does, Sample):
        unknown = [rule for rule in does.reject if rule not in RULES]
        faults += [f"reject: {rule!r} is not a rule{did_you_mean(rule, RULES)}" for rule in unknown]
    assert isinstance(does, Sample | Evaluate | MakeModel | Export)
    return does


def _nested(key: str, value: Any) -> dict[str, Any]:
    """ "a.b", 1 -> {"a": {"b": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)
