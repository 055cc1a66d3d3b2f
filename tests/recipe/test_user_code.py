"""Methods, contexts and weights of the user's own: from a file, a module and an installed package, without an edit of
ours; what is wrong with one is a sentence, and a resumed run has the code it began with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.recipe import Recipe, load_recipe, parse_recipe

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
FILE = """
from __future__ import annotations
from typing import ClassVar, Literal
from pydantic import model_validator
from opdkit.contexts import Context, Reading
from opdkit.methods.distillation import Distillation
from opdkit.methods.base import Method
from opdkit.methods.weighting.base import Named
import helper_of_mine

class Mine(Distillation):
    name: Literal["mine"] = "mine"
    divergence: Literal["jsd"] = "jsd"
    teacher_share: float | None = 0.5
    strength: float = helper_of_mine.STRENGTH
    defaults: ClassVar = {"sampling": {"group_size": 3}}

class Hint(Context):
    kind: str
    words: str = "1"
    def read(self, group, rollout, cut):
        return Reading(messages=({"role": "user", "content": self.words}, *group.problem.messages))

class Same(Named):
    def apply(self, plan):
        return plan

class NoTerms(Method):
    @property
    def needs(self):
        raise KeyError("needs")

class Fails(Distillation):
    @model_validator(mode="after")
    def check(self):
        raise KeyError("k")

class FailsLater(Distillation):
    @property
    def needs(self):
        return [][0]

class ReadsNothing(Context):
    pass

def function(): pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "helper_of_mine.py").write_text("STRENGTH = 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "helper_of_mine", raising=False)
    return tmp_path


def raw(method: str = "opd", context: str = "none", tokens: str | None = None, **model: Any) -> dict[str, Any]:
    return {
        "name": "r",
        "model": {"path": "m", **model},
        "teacher": {"kind": "self", "weights": "initial"},
        "context": {"kind": context},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 8},
        "method": {"name": method},
        "weights": {} if tokens is None else {"tokens": {"name": tokens}},
        "train": {"steps": 1, "problems_per_step": 2},
    }


def test_a_file_gives_all_three(folder: Path) -> None:
    """With its keys, defaults and names; what a run writes is a recipe that reads as the same."""
    recipe = parse_recipe(raw("mine.py:Mine", "mine.py:Hint", "mine.py:Same"))
    assert recipe.method.name == "mine.py:Mine" and recipe.method.strength == 2.0  # type: ignore[attr-defined]
    assert recipe.sampling.group_size == 3 and recipe.context.kind == "mine.py:Hint"
    again = parse_recipe(recipe.as_dict())
    assert again.as_dict() == recipe.as_dict() and again.user_files == recipe.user_files
    names = {name.partition(" imports ")[0] for name in recipe.user_files}
    assert names == {"method mine.py:Mine", "context mine.py:Hint", "weight mine.py:Same"}
    assert "method mine.py:Mine imports helper_of_mine.py" in recipe.user_files
    assert parse_recipe(raw()).user_files == {}
    views = {"other": {"teacher": {"kind": "self", "weights": "initial"}, "context": {"kind": "mine.py:Hint"}}}
    told = {**raw(), "views": views, "method": {"name": "opd", "target": {"teacher": 2.0, "other": -1.0}}}
    assert "context mine.py:Hint" in parse_recipe(told).user_files


def test_tuples_of_ones_own_are_lists_in_a_recipe(folder: Path) -> None:
    """As TOML has them: written there, by a run into recipe.toml, or read again for each stage of a schedule."""
    (folder / "tuples.py").write_text(
        "from opdkit.contexts import Context, Reading\nfrom opdkit.methods.distillation import Distillation\n"
        "class Words(Context):\n    words: tuple[str, ...] | None = ('a', 'b')\n"
        "    def read(self, group, rollout, cut):\n        return Reading(messages=group.problem.messages)\n"
        "class Two(Distillation):\n    pair: tuple[int, int] = (1, 2)\n"
    )
    told = raw("tuples.py:Two", "tuples.py:Words") | {"schedule": {"sampling.temperature": [[0.0, 1.0], [0.5, 0.9]]}}
    told["train"] = {**told["train"], "steps": 2}
    recipe = parse_recipe(told)
    assert parse_recipe(recipe.as_dict()).as_dict() == recipe.as_dict()
    own = parse_recipe(raw("tuples.py:Two") | {"context": {"kind": "tuples.py:Words", "words": ["c"]}})
    assert own.context.words == ("c",)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"method\.pair"):
        parse_recipe(raw() | {"method": {"name": "tuples.py:Two", "pair": [1, 2, 3]}})


def test_a_schedule_moves_a_key_of_ones_own(folder: Path) -> None:
    from opdkit.recipe import stages_of

    told = raw("mine.py:Mine") | {"schedule": {"method.strength": [[0.0, 1.0], [0.5, 3.0]]}}
    told["train"] = {**told["train"], "steps": 2}
    stages = stages_of(parse_recipe(told))
    assert [stage.method.strength for stage in stages.values()] == [1.0, 3.0]  # type: ignore[attr-defined]


def test_a_module_and_an_installed_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module:name, and by the plain name of an entry point, whose module is imported only when it is named."""
    package = folder / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(FILE.replace("import helper_of_mine", "from . import helper_of_mine"))
    (package / "helper_of_mine.py").write_text("STRENGTH = 4.0\n")
    recipe = parse_recipe(raw("some_package.part:Mine"))
    assert recipe.method.strength == 4.0  # type: ignore[attr-defined]
    assert {*recipe.user_files} == {
        "method some_package.part:Mine",
        "method some_package.part:Mine imports some_package/__init__.py",
        "method some_package.part:Mine imports some_package/helper_of_mine.py",
    }
    info = folder / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (folder / "rewards_of_mine.py").write_text("def right(completions, **columns): return [1.0] * len(completions)")
    (info / "entry_points.txt").write_text(
        "[opdkit.methods]\nplain = some_package.part:Mine\nbroken = not_there:X\n"
        "[opdkit.contexts]\nhint = some_package.part:Hint\n[opdkit.token_weights]\nsame = some_package.part:Same\n"
        "[opdkit.tasks]\nrighteous = rewards_of_mine:right\n"
    )
    told = raw("plain", "hint", "same")
    told["data"]["task"] = "righteous"
    recipe = parse_recipe(told)
    assert (recipe.method.name, recipe.context.kind, recipe.data.task.name) == ("plain", "hint", "righteous")
    assert {"method plain", "context hint", "weight same", "task righteous"} <= {*recipe.user_files}
    assert parse_recipe(recipe.as_dict()).as_dict() == recipe.as_dict()
    with pytest.raises(UserError, match=r"method.name = 'broken' cannot be found: there is no module not_there"):
        parse_recipe(raw("broken"))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            {"method": "mine.py:Nine"},
            r"method.name = 'mine.py:Nine' cannot be found: mine.py has no Nine; it defines M",
        ),
        (
            {"method": "mine.py:Hint"},
            r"'mine.py:Hint' is no method; make Hint in mine.py a class with the base opdkit\.",
        ),
        ({"method": "mine.py:function"}, "'mine.py:function' is no method"),
        ({"method": "mine.py:NoTerms"}, "is no whole method: NoTerms does not define terms"),
        ({"method": "mine.py"}, r"does not say which class of mine.py is meant \(Mine, "),
        ({"method": "mine.py:Fails"}, r"'mine.py:Fails' fails: KeyError: 'k' \(mine.py:\d+\)"),
        ({"method": "mine.py:FailsLater"}, r"'mine.py:FailsLater' fails: IndexError: .* \(mine.py:\d+\)"),
        ({"method": "nine.py:Mine"}, r"there is no file nine.py \(looked up from"),
        ({"method": "nine.ten:Mine"}, "there is no module nine"),
        ({"method": "raises.py:X"}, r"cannot be imported: ZeroDivisionError: division by zero \(raises.py:1\)"),
        ({"method": "exits.py:X"}, "cannot be imported: SystemExit: 3"),
        ({"method": "typo.py:X"}, "cannot be imported: SyntaxError"),
        ({"method": "lacks.py:X"}, "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ({"method": "oppd"}, "method.name = 'oppd' does not exist; did you mean \"opd\""),
        ({"context": "mine.py:Mine"}, "context.kind = 'mine.py:Mine' is no context"),
        ({"context": "mine.py:ReadsNothing"}, "ReadsNothing defines neither read nor read_groups"),
        ({"tokens": "mine.py:Mine"}, "weights.tokens.name = 'mine.py:Mine' is no weight of tokens"),
    ],
)
def test_what_is_wrong_is_a_sentence(folder: Path, names: dict[str, str], sentence: str) -> None:
    texts = {"raises": "1/0", "exits": "raise SystemExit(3)", "typo": "def", "lacks": "import nowhere"}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        parse_recipe(raw(**names))
    assert len(str(caught.value).splitlines()) == 1


def test_an_edited_file_is_read_again_and_an_edited_helper_refused(folder: Path) -> None:
    """In one process: the file's own text runs; a module that was imported once cannot be had anew."""
    first = parse_recipe(raw("mine.py:Mine")).user_files["method mine.py:Mine"]
    (folder / "mine.py").write_text(FILE.replace('"group_size": 3', '"group_size": 5'))
    recipe = parse_recipe(raw("mine.py:Mine"))
    assert recipe.sampling.group_size == 5 and recipe.user_files["method mine.py:Mine"] != first
    (folder / "helper_of_mine.py").write_text("STRENGTH = 3.0\n")
    with pytest.raises(UserError, match="has changed since this process imported it; start Python again"):
        parse_recipe(raw("mine.py:Mine"))


def test_reading_a_runs_page_imports_nothing(folder: Path) -> None:
    """A run folder may be somebody else's: only a recipe that is checked or run imports what it names."""
    (folder / "loud.py").write_text(f"{FILE}\nopen({str(folder / 'ran')!r}, 'w')")
    run = folder / "runs" / "r"
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text('name = "r"\n[method]\nname = "loud.py:Mine"\n[context]\nkind = "loud.py:Hint"\n')
    from opdkit.reporting import write_report

    write_report(run)
    assert not (folder / "ran").exists()
    with pytest.raises(UserError):  # it lacks model.path
        load_recipe(run / "recipe.toml")
    assert (folder / "ran").exists()


def test_the_page_s_method_from_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    """CONTRIBUTING's lines as `mine.py:Mine`, trained, and resumed only with the same text."""
    from rich.console import Console

    from opdkit.training.loop import train

    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)

    def recipe(steps: int) -> Recipe:
        told = raw("mine.py:Mine", path=str(models["student"]), dtype="float32", device="cpu")
        told["teacher"] = {"kind": "model", "path": str(models["teacher"])}
        told["sampling"] = {"max_answer_tokens": 8, "group_size": 2}
        return parse_recipe({**told, "train": {"steps": steps, "problems_per_step": 2, "schedule": "constant"}})

    quiet = Console(quiet=True)
    assert train(recipe(1), console=quiet)["method"] == "mine.py:Mine"
    (tmp_path / "mine.py").write_text(f"{code}\n# another text\n")
    with pytest.raises(UserError, match=r"method mine.py:Mine is not what it was .*\(its code changed\)"):
        train(recipe(2), console=quiet, resume=True)
    (tmp_path / "mine.py").write_text(code)
    assert train(recipe(2), console=quiet, resume=True)["steps"] == 2


def test_files_beside(tmp_path: Path) -> None:
    """Read off the text: absolute, relative, from inside functions, around in a circle; not what is elsewhere."""
    from opdkit.recipe.user_files import files_beside

    def write(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    main = write(
        "main.py", "import os, a.b\ndef f():\n    from c import d\nfrom . import e\nimport torch\nfrom ..up import x"
    )
    for name in ("a/__init__.py", "a/b.py", "c/d.py", "unused.py"):
        write(name, "")
    write("e.py", "import main, e")
    assert [*files_beside(main, main.read_bytes(), root=tmp_path)] == ["a/__init__.py", "a/b.py", "c/d.py", "e.py"]
    assert [*files_beside(main, b"import a.b, e", root=tmp_path, package="a")] == ["a/__init__.py", "a/b.py"]
    assert not files_beside(main, b"this is no Python", root=tmp_path)


def test_a_check_stays_light(folder: Path) -> None:
    """A file of the user's own that needs no torch brings none in."""
    code = "import sys; from opdkit.recipe import parse_recipe; parse_recipe(RAW); assert 'torch' not in sys.modules"
    told = repr(raw("mine.py:Mine", "mine.py:Hint", "mine.py:Same"))
    done = subprocess.run([sys.executable, "-c", code.replace("RAW", told)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
