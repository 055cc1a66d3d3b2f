"""Pipelines as files: what a stage becomes, and what is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from opdkit import toml
from opdkit.errors import UserError
from opdkit.recipe import Recipe, load_recipe
from opdkit.recipe.check import check_file
from opdkit.recipe.pipeline import Pipeline, load_pipeline
from opdkit.recipe.stage_kinds import Sample

ANSWERS: dict[str, Any] = {"name": "answers", "kind": "sample", "model": "{big}", "data": "d.jsonl", "task": "math"}
SFT: dict[str, Any] = {"name": "sft", "kind": "train", "recipe": "sft.toml", "set": {"data": {"train": "{answers}"}}}
OPD: dict[str, Any] = {
    "name": "opd",
    "kind": "train",
    "recipe": {
        "model": {"path": "{sft}"},
        "teacher": {"kind": "model", "path": "{big}"},
        "method": {"name": "opd"},
        "train": {"steps": 7},
    },
}
SFT_FILE = {
    "name": "its-own-name",
    "model": {"path": "{small}", "dtype": "float32"},
    "data": {"train": "other.jsonl", "task": "math"},
    "method": {"name": "sft"},
    "train": {"steps": 5, "lr": 1e-4},
}
PIPELINE: dict[str, Any] = {
    "name": "chain",
    "runs_dir": "out",
    "paths": {"big": "org/big", "small": "org/small"},
    "recipe": {"data": {"train": "d.jsonl", "task": "math"}, "train": {"lr": 1e-6, "weight_decay": 0.1}},
    "stage": [ANSWERS, SFT, OPD],
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def write(*overrides: str, **changes: Any) -> Pipeline:
        (tmp_path / "sft.toml").write_text(toml.dumps(SFT_FILE))
        content = {**PIPELINE, **changes}
        stages = content.pop("stage")
        text = toml.dumps(content) + "".join(f"\n[[stage]]\n{_inline(table)}" for table in stages)
        (tmp_path / "p.toml").write_text(text)
        return load_pipeline(tmp_path / "p.toml", overrides)

    return write


def _inline(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {toml._value(value, (key,))}\n" for key, value in table.items())


def recipe_of(pipeline: Pipeline, name: str) -> Recipe:
    (does,) = [stage.does for stage in pipeline.stages if stage.name == name]
    assert isinstance(does, Recipe)
    return does


def test_every_stage_is_known_before_anything_runs(load: Any) -> None:
    """Results are paths in the pipeline's folder; a training stage's is the model after its last step."""
    pipeline = load()
    assert [str(stage.result) for stage in pipeline.stages] == [
        "out/chain/answers/answers.jsonl",
        "out/chain/sft/checkpoints/step_000005/model",
        "out/chain/opd/checkpoints/step_000007/model",
    ]
    assert [stage.reads for stage in pipeline.stages] == [(), ("answers",), ("sft",)]
    sft, opd = recipe_of(pipeline, "sft"), recipe_of(pipeline, "opd")
    assert sft.data.train == "out/chain/answers/answers.jsonl" and sft.model.path == "org/small"
    assert opd.model.path == "out/chain/sft/checkpoints/step_000005/model" and opd.teacher.path == "org/big"
    assert sft.run_dir == Path("out/chain/sft"), "a run folder like any other, whatever the recipe calls itself"
    answers = pipeline.stages[0].does
    assert isinstance(answers, Sample) and answers.model == "org/big" and answers.attempts == 3


def test_what_wins_over_what(load: Any) -> None:
    """[recipe] < the stage's file < its set < --set; and another teacher, method or context starts afresh."""
    pipeline = load(
        "sft.train.steps=6", "opd.train.lr=1e-3", "paths.small=org/smaller", "recipe.train.weight_decay=0.2"
    )
    sft, opd = recipe_of(pipeline, "sft"), recipe_of(pipeline, "opd")
    assert (sft.train.steps, sft.train.lr, sft.train.weight_decay) == (6, 1e-4, 0.2)
    assert sft.model.path == "org/smaller" and "step_000006" in opd.model.path
    assert (opd.train.lr, opd.data.train) == (1e-3, "d.jsonl")
    shared = {**PIPELINE["recipe"], "teacher": {"kind": "model", "path": "org/big"}}
    none = {**SFT, "set": {"teacher": {"kind": "none"}}}
    assert recipe_of(load(recipe=shared, stage=[ANSWERS, none]), "sft").teacher.path is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": [SFT]}, "stage sft: {answers} in '{answers}' is no earlier stage and no name of [paths]"),
        ({"stage": [OPD, SFT]}, "stage opd: {sft} in '{sft}' is no earlier stage"),
        ({"paths": {"bigg": "x", "small": "y"}}, 'did you mean "bigg"?'),
        ({"stage": [ANSWERS, ANSWERS]}, 'stage 2: an earlier stage is called "answers" too'),
        ({"stage": [{**ANSWERS, "name": "a b"}]}, "stage 1: name = 'a b'; give it one of letters"),
        ({"stage": [{**ANSWERS, "name": "paths"}]}, "stage 1: name = 'paths'"),
        ({"stage": [{**ANSWERS, "kind": "smaple"}]}, "stage answers: kind = 'smaple'; did you mean \"sample\"?"),
        ({"stage": [{**ANSWERS, "modl": "x"}]}, 'stage answers: modl is not a key; did you mean "model"?'),
        ({"stage": [{**ANSWERS, "task": "mth"}]}, "stage answers: task = 'mth' does not exist; did you mean \"math\"?"),
        ({"stage": [{**ANSWERS, "reject": ["wrogn"]}]}, "reject: 'wrogn' is not a rule; did you mean \"wrong\"?"),
        ({"stage": [{**ANSWERS, "temperature": 0.0, "n": 4}]}, "n = 4 at temperature = 0"),
        ({"stage": [ANSWERS, {**SFT, "recipe": "sfft.toml"}]}, "no such recipe file; did you mean"),
        ({"stage": [ANSWERS, {**SFT, "train": {"steps": 3}}]}, "stage sft: train is not a key of a stage that trains"),
        (
            {"stage": [ANSWERS, {**SFT, "set": {"train": {"setps": 3}}}]},
            'train.setps is not a key; did you mean "steps"',
        ),
        ({"stage": [ANSWERS, {**SFT, "set": {"teacher": {"kind": "self", "weights": "initial"}}}]}, "never asks"),
        ({"stages": 3}, 'stages is not a key; did you mean "stage"?'),
        ({"name": "a/b"}, "name = 'a/b': give the pipeline a name"),
        ({"paths": {"sft": "x"}}, "sft is the name of a path and of a stage"),
        ({"paths": 3}, "write [paths] with NAME"),
        ({"recipe": "sft.toml"}, "[recipe] holds what stages that train have in common"),
    ],
)
def test_what_is_refused_and_how(changes: dict[str, Any], words: str, load: Any) -> None:
    """Each sentence names the file, the stage and the key. Not every possible slip."""
    with pytest.raises(UserError) as refused:
        load(**changes)
    assert words in str(refused.value) and all("p.toml: " in line for line in str(refused.value).splitlines())


@pytest.mark.parametrize("text", ["stage = []", "stage = 3", "[stage]"])
def test_a_pipeline_without_stages_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(f'name = "p"\n{text}\n')
    with pytest.raises(UserError, match=r"write one \[\[stage\]\] or more"):
        load_pipeline(tmp_path / "p.toml")


def test_an_adapter_is_begun_once_and_then_trained_on(load: Any) -> None:
    """The model that a LoRA stage makes is an adapter: a second one on top is refused now, not after the first stage
    has trained; going on with it is not, and its base model may teach it."""
    on = {**OPD, "recipe": {**OPD["recipe"], "teacher": {"kind": "self", "weights": "adapter_off"}}}
    on["recipe"]["context"] = {"kind": "reference_solution"}
    with pytest.raises(UserError, match=r'stage opd: teacher\.weights = "adapter_off" needs a LoRA student'):
        load(stage=[ANSWERS, SFT, on])
    pipeline = load("sft.model.lora.r=8", stage=[ANSWERS, SFT, on])
    assert [stage.is_adapter for stage in pipeline.stages] == [False, True, True]
    with pytest.raises(UserError, match=r"stage opd: model\.path = .*sft.* is itself an adapter: remove model\.lora"):
        load("recipe.model.lora.r=8", stage=[ANSWERS, SFT, on])


def test_settings_that_reach_nothing_are_refused(load: Any) -> None:
    with pytest.raises(UserError, match='opdd is no stage; did you mean "opd"'):
        load("opdd.train.steps=3")
    with pytest.raises(UserError, match="train is no stage"):
        load("train.steps=3")
    for bare in ("sft", "recipe"):
        with pytest.raises(UserError, match=f"name one of {bare}'s keys"):
            load(f"{bare}=3")
    with pytest.raises(UserError, match="stage sft: --set name is never read"):
        load("sft.name=other")
    with pytest.raises(UserError, match=r"stage sft: \[recipe\] runs_dir is never read"):
        load("recipe.runs_dir=other")


def test_faults_of_all_stages_are_said_at_once(load: Any) -> None:
    stages = [{**ANSWERS, "n": 0}, {**SFT, "set": {**SFT["set"], "train": {"lr": -1.0}}}, {**OPD, "recipe": {}}]
    with pytest.raises(UserError) as refused:
        load(stage=stages)
    said = str(refused.value)
    assert "stage answers: n = 0" in said and "stage sft: train.lr = -1.0" in said and "stage opd: method.name" in said


def test_a_pipeline_is_no_recipe_and_a_recipe_no_pipeline(load: Any, tmp_path: Path) -> None:
    load()
    with pytest.raises(UserError, match="is a pipeline, not a recipe: run it with `opdkit pipeline"):
        load_recipe(tmp_path / "p.toml")
    with pytest.raises(UserError, match=r"has no \[\[stage\]\]: a recipe is run by `opdkit train"):
        load_pipeline(tmp_path / "sft.toml")


def test_check_says_what_is_doubtful(load: Any, tmp_path: Path) -> None:
    """A file that no stage makes and nobody has; the answers that a stage will make are not doubtful."""
    load()
    said = check_file(tmp_path / "p.toml")
    assert said == [
        "stage answers: data = d.jsonl: there is no such file or folder yet",
        "stage opd: data.train = d.jsonl: there is no such file or folder yet",
    ]
