"""What a person gets who typed it wrong or fed it broken data: one sentence, status 2, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit import cli, toml
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.training.loop import train

Make = Callable[..., Recipe]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["opdkit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def write(recipe: Recipe, path: Path) -> str:
    path.write_text(toml.dumps(recipe.as_dict()))
    return str(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("", "holds no rows"),
        ('{"problem": "1+1?", "answer": "2"}\n{"problem": \n', ":2"),
        ('{"problem": "1+1?"}\n', "no answer column"),
        ('{"text": "1+1?", "label": "2"}\n', "text, label"),
    ],
)
def test_broken_data(content: str | None, words: str, recipe: Make, run_cli: Any, tmp_path: Path) -> None:
    """Missing or empty file, broken line (with its number), no answer, unknown columns: before weights are loaded."""
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    path = write(
        recipe("grpo", f"data.train={data}", "data.limit=1", "data.task=math", "model.path=/no/such"),
        tmp_path / "r.toml",
    )
    code, said = run_cli("train", path)
    assert code == 2 and words in said and "Traceback" not in said, said


def test_unknown_method(recipe: Make, run_cli: Any, tmp_path: Path) -> None:
    path = write(recipe("grpo"), tmp_path / "r.toml")
    code, said = run_cli("train", path, "--set", "method.name=grop")
    assert code == 2 and 'did you mean "grpo"?' in said


def test_missing_model_folder(recipe: Make, run_cli: Any, tmp_path: Path) -> None:
    path = write(recipe("grpo", "model.path=/no/such/model"), tmp_path / "r.toml")
    code, said = run_cli("train", path)
    assert code == 2 and "/no/such/model" in said and "Traceback" not in said


def test_tokenizer_without_chat_template(
    recipe: Make, models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    """The sentence says how to give it one, and that way works."""
    bare = tmp_path / "bare"
    shutil.copytree(models["student"], bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r'no chat template.*chat_template.*jinja file, or to "plain"'):
        train(recipe("grpo", f"model.path={bare}"), console=console)
    template = models["student"] / "chat_template.jinja"
    train(
        recipe("grpo", f"model.path={bare}", f"model.chat_template={template}", "train.steps=1"),
        console=console,
        overwrite=True,
    )


def test_long_prompts_leave_the_data_and_are_counted(recipe: Make, console: Console, tmp_path: Path) -> None:
    """Two of seven prompts are too long: five are trained on, the summary says so; all too long: refused."""
    data = tmp_path / "sums.jsonl"
    questions = ["1+1="] * 5 + ["1+" * 20 + "1="] * 2
    rows = [{"id": str(i), "problem": q, "answer": "2"} for i, q in enumerate(questions)]
    data.write_text("\n".join(map(json.dumps, rows)))
    keys = (f"data.train={data}", "data.limit=7", "data.task=math", "data.instruction=none", "train.steps=1")
    summary = train(recipe("grpo", *keys, "data.max_prompt_tokens=30"), console=console)
    left_out, nothing_taught = summary["warnings"]  # a random student earns no reward
    assert left_out == "2 of 7 problems are left out: their prompts are longer than 30 tokens (first: 5, 44)"
    assert nothing_taught.startswith("step 1: the step taught nothing")
    with pytest.raises(UserError, match=r"every prompt is longer than 3 tokens \(the first: 6\)"):
        train(recipe("grpo", *keys, "data.max_prompt_tokens=3"), console=console, overwrite=True)


def test_answers_that_leave_no_room_for_a_prompt(recipe: Make, console: Console) -> None:
    with pytest.raises(UserError, match=r"max_answer_tokens = 96 leaves no room for a prompt.*96 positions"):
        train(recipe("grpo", "sampling.max_answer_tokens=96"), console=console)


def test_sft_without_solutions(recipe: Make, console: Console, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"problem": f"{i}+1=", "answer": "2"}) for i in range(5)))
    keys = (f"data.train={data}", "data.limit=5", "data.task=math", "data.instruction=none")
    with pytest.raises(UserError, match=r"trains on solutions, but problem .* has none"):
        train(recipe("sft", *keys), console=console)


def test_a_device_that_is_not_there(recipe: Make, console: Console) -> None:
    with pytest.raises(UserError, match=r'model\.device = "warp" is not available here.*"auto" or "cpu"'):
        train(recipe("grpo", "model.device=warp"), console=console)
