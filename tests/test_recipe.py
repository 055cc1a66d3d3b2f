"""Recipes: what is refused, in which words, and what wins over what."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from opdkit import toml
from opdkit.errors import UserError
from opdkit.recipe import Recipe, key_values, load_recipe, parse_recipe
from opdkit.recipe.rules.departures import departures

ROOT = Path(__file__).parent.parent
MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "task": "math"},
    "method": {"name": "opsd"},
    "train": {"steps": 10},
}


def recipe(*overrides: str, **sections: Any) -> Recipe:
    return parse_recipe({**MINIMAL, **sections}, overrides)


def faults(*overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(UserError) as refusal:
        recipe(*overrides, **sections)
    return str(refusal.value).splitlines()


def test_method_defaults_lose_to_the_recipe_which_loses_to_set() -> None:
    """The paper's lr is 5e-6; the recipe may change it; --set has the last word."""
    assert recipe().train.lr == 5e-6
    assert recipe(train={"steps": 10, "lr": 1e-5}).train.lr == 1e-5
    assert recipe("train.lr=2e-5", train={"steps": 10, "lr": 1e-5}).train.lr == 2e-5


def test_another_kind_of_teacher_starts_afresh() -> None:
    """opsd's default weights = "initial" must not leak into somebody's own teacher model."""
    resolved = recipe(teacher={"kind": "model", "path": "t"})
    assert resolved.teacher.weights is None and resolved.teacher.path == "t"


def test_resolved_recipe_round_trips_through_toml() -> None:
    """recipe.toml of a run is complete: reading it back gives the same recipe."""
    first = recipe("method.loss_temperature=0.9", "eval.data=['a.jsonl', 'b.jsonl']", "model.lora.r=8")
    again = parse_recipe(tomllib.loads(toml.dumps(first.as_dict())))
    assert again == first


def test_all_faults_are_reported_at_once() -> None:
    """Unknown method, unknown key, key of another section, wrong type: one sentence each, in one go."""
    said = faults(
        "train.lr='fast'", "train.setps=3", "model.lr=1", method={"name": "opdd"}, data={"train": "d", "task": "mth"}
    )
    text = "\n".join(said)
    assert "method.name = 'opdd' does not exist; did you mean \"opd\"?" in text
    assert "data.task = 'mth'" in text and 'did you mean "math"?' in text
    assert 'train.setps is not a key; did you mean "steps"?' in text
    assert "model.lr is not a key; there is train.lr" in text
    assert "train.lr = 'fast': input should be a valid number" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.kind=model"], "needs teacher.path"),
        (["teacher.weights=adapter_off"], "needs a LoRA student"),
        (["teacher.weights=ema"], "needs teacher.ema_rate"),
        (["teacher.ema_rate=0.1"], 'only read with teacher.weights = "ema"'),
        (["teacher.kind=none"], "needs a teacher"),
        (["teacher.weights=live", "context.kind=none"], "compares the student with itself"),
        (["method.support=sampled"], "estimates reverse_kl from one token"),
        (["method.support=student_topk"], "needs k >= 1"),
        (["method.support=student_topk", "method.k=1", "method.tail=renormalise"], "identically zero"),
        (["method.divergence=jsd"], "needs teacher_share"),
        (["method.name=grpo", "context.kind=none", "teacher.kind=none", "sampling.group_size=1"], "no group to"),
        (["method.name=grpo", "sampling.temperature=0.7"], "would compare two distributions"),
        (["method.name=grpo", "context.kind=reference_solution"], "asks no teacher to score"),
        (["method.name=grpo", "teacher.kind=self", "teacher.weights=initial"], "never asks"),
        (["sampling.group_size=4", "sampling.temperature=0"], "same greedy answer"),
        (["eval.every=5"], "needs eval.data"),
        (["train.warmup_steps=10"], "leaves none of train.steps"),
        (["log.sinks=['wandbb']"], 'did you mean "wandb"?'),
        (["data.limit=0"], "greater than 0"),
        (["data.train=arithmetic:nope:train"], "data.train = arithmetic:nope:train: unknown arithmetic variant"),
        (["eval.data=arithmetic:merge-3"], "is incomplete"),
        ([f"model.path={__file__}"], "is no folder; give a folder with a config.json"),
        ([f"runs_dir={__file__}"], "is no folder, and runs are written below it"),
        (["train.lr=true"], "input should be a valid number"),
        (["name='a/b'"], "name = 'a/b'"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], words: str) -> None:
    """Each sentence names the key and its reason. Does not prove that every impossible recipe is caught."""
    assert words in "\n".join(faults(*overrides))


def test_biased_estimates_are_warned_about() -> None:
    """A sampled-token loss from a truncated or re-tempered sampler works, and is probably not meant."""
    from opdkit.recipe import warnings

    keys = ("method.support=sampled", "method.divergence=reverse_kl", "method.clip=none")
    assert any("biased" in sentence for sentence in warnings(recipe(*keys)))
    honest = ("sampling.top_p=1.0", "sampling.top_k=0")
    assert not any("biased" in sentence for sentence in warnings(recipe(*keys, *honest)))


def test_set_reads_toml_values_and_bare_words() -> None:
    values = key_values(["a.b=1", "c=x/y.jsonl", "d=[1, 2]", 'e="1"'])
    assert values == {"a.b": 1, "c": "x/y.jsonl", "d": [1, 2], "e": "1"}
    with pytest.raises(UserError, match="write it as --set key=value"):
        key_values(["lr"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file suggests its neighbour, broken TOML says where."""
    (tmp_path / "opsd.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"did you mean .*opsd\.toml"):
        load_recipe(tmp_path / "opds.toml")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(tmp_path / "opsd.toml")


def test_shipped_recipes_are_valid() -> None:
    """`opdkit check recipes/*.toml` passes, and quickly: no torch is imported."""
    paths = sorted((ROOT / "recipes").glob("**/*.toml"))
    assert paths
    code = "import sys; from opdkit.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "check", *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_recipe_and_links() -> None:
    """The recipe on the first page passes `opdkit check`, and what the page links to is there."""
    page = (ROOT / "README.md").read_text()
    (recipe,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert parse_recipe(tomllib.loads(recipe)).method.name == "opd"
    linked = re.findall(r"\]\(([^)#]+)", page)
    assert linked and all((ROOT / link).exists() for link in linked)


@pytest.mark.parametrize(("steps", "warmup", "yields"), [(1, 0, True), (4, 2, True), (10, 5, True), (11, 10, False)])
def test_a_default_yields_to_what_is_written(steps: int, warmup: int, yields: bool) -> None:
    """mopd's own warm-up of 10 steps in a smoke run: half of the steps, and said. Others are left as they are."""
    from opdkit.recipe import warnings

    short = recipe("method.name=mopd", f"train.steps={steps}")
    assert short.train.warmup_steps == warmup
    said = [sentence for sentence in warnings(short) if "warmup_steps" in sentence]
    assert bool(said) == yields and all("the method's own 10" in sentence for sentence in said)
    assert "yielded" not in short.as_dict() and parse_recipe(short.as_dict()).train.warmup_steps == warmup


def test_a_written_value_never_yields() -> None:
    assert (
        "train.warmup_steps = 4 leaves none" in faults("method.name=mopd", "train.steps=4", "train.warmup_steps=4")[0]
    )


def test_departures_from_the_methods_own_defaults_are_one_line() -> None:
    """The README's way from opd to mopd keeps the external teacher, the direction and the learning rate: all named.
    Of a teacher of another kind the kind alone is said; what is as the paper has it, or yielded, is not."""
    readme = {"teacher": {"kind": "model", "path": "t"}, "method": {"name": "mopd", "divergence": "reverse_kl"}}
    said = departures(recipe("train.steps=4", "train.lr=1e-6", **readme))
    assert said is not None and said.startswith("not as mopd has it by default: ") and "\n" not in said
    for part in (
        'teacher.kind = "model" ("self")',
        'method.divergence = "reverse_kl" ("jsd")',
        "train.lr = 1e-06 (1e-05)",
    ):
        assert part in said
    assert "ema_rate" not in said and "warmup_steps" not in said
    assert departures(recipe("method.name=mopd", "train.steps=100")) is None
    assert departures(recipe("sampling.temperature=1.1")) is None, "written, and as the paper has it"
    narrower = departures(recipe("method.name=mopd", "train.steps=100", "context.slots=['success','success']"))
    assert narrower is not None and 'context.slots = ["success", "success"]' in narrower


def test_check_says_departures(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from opdkit.cli import app

    path = tmp_path / "r.toml"
    path.write_text(toml.dumps({**MINIMAL, "method": {"name": "mopd"}, "teacher": {"kind": "model", "path": "t"}}))
    said = CliRunner().invoke(app, ["check", str(path)])
    assert said.exit_code == 0 and 'note not as mopd has it by default: teacher.kind = "model" ("self")' in said.output


def test_a_teacher_that_answers_cannot_read_answers_that_are_not_there() -> None:
    """Peers of answers that the teacher has yet to write; a solution it can read."""
    keys = ("method.name=opd", "method.divergence=forward_kl", "method.answers=teacher", "teacher.kind=self")
    teacher = (*keys, "teacher.weights=initial")
    assert "would have to read them before there are any" in "\n".join(faults(*teacher, "context.kind=peers"))
    assert recipe(*teacher, "context.kind=reference_solution").method.answer_source == "teacher"
