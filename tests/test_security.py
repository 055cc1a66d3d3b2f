"""What strangers and mistakes could do with what opdkit reads and writes; docs/inside/security.md names these tests."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from opdkit.errors import UserError
from opdkit.recipe import Recipe, warnings
from opdkit.run import stored_answers
from opdkit.run.rows import load_rows
from opdkit.training.loop import train

Make = Callable[..., Recipe]
PLANTED = "hf_PLANTEDplantedPLANTEDplanted0123"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


def test_no_secret_of_the_environment_is_in_any_file(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run folder is searched, its page and its checkpoints too, and what was said."""
    from opdkit.reporting import write_report

    for name in VARIABLES:
        monkeypatch.setenv(name, PLANTED)
    chosen = recipe("sft", "train.steps=1", "log.sinks=['tensorboard']")
    train(chosen, console=Console(width=200))
    write_report(chosen.run_dir)
    files = [path for path in chosen.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 12 and not [path for path in files if PLANTED.encode() in path.read_bytes()]
    out = capsys.readouterr()
    assert PLANTED not in out.out + out.err


@pytest.mark.parametrize(
    "key",
    [
        f"model.template_kwargs={{note='{PLANTED}'}}",
        "model.template_kwargs={api_key='short'}",
        f"log.project={PLANTED}",
        "sampling.vllm.extra_args=['--api-key', 'abc']",
        "model.system='-----BEGIN RSA PRIVATE KEY-----'",
        "teacher.system='sk-planted_0123456789abcdef'",
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_the_secret_not_said(key: str, recipe: Make) -> None:
    more = ("sampling.engine=vllm",) if "vllm" in key else ()
    with pytest.raises(UserError, match="looks like a secret") as caught:
        recipe("opd", key, *more)
    assert PLANTED not in str(caught.value) and "sk-" not in str(caught.value)


def test_trusted_code_is_said(recipe: Make, models: dict[str, Path]) -> None:
    said = warnings(recipe("opd", "model.trust_remote_code=true", "teacher.trust_remote_code=true"))
    assert sum("with all your rights" in sentence for sentence in said) == 2
    assert str(models["teacher"]) in " ".join(said)
    assert not any("rights" in sentence for sentence in warnings(recipe("opd")))


@pytest.fixture
def hub(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A cache as downloads leave it, with a model of two commits; makes one of them the newest."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    place = cache / "models--org--tiny"
    for commit, which in (("a" * 40, "student"), ("b" * 40, "teacher")):
        shutil.copytree(models[which], place / "snapshots" / commit)
    (place / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def newest(commit: str) -> None:
        (place / "refs/main").write_text(commit * 40)

    newest("a")
    return newest


def test_a_models_commit_is_kept_and_used_again(
    recipe: Make, hub: Callable[[str], None], models: dict[str, Path], console: Console
) -> None:
    """The hub's newest files are other ones when the run goes on: it reads those that it began with. With files on this
    machine alone; how the hub answers is not tried."""
    keys = ("train.schedule=constant", "model.lora={r=2, alpha=4}", "model.path=org/tiny")
    chosen = recipe("sft", *keys, "train.steps=1")
    train(chosen, console=console)
    known = json.loads((chosen.run_dir / "environment.json").read_text())["commits"]
    assert known == {"org/tiny": "a" * 40}
    hub("b")
    longer = recipe("sft", *keys, "train.steps=2")
    train(longer, console=console, resume=True)
    whole = recipe("sft", *keys[:2], f"model.path={models['student']}", "train.steps=2", "name=whole")
    train(whole, console=console)
    losses = [_losses(one) for one in (longer, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    other = recipe("sft", *keys, "train.steps=1", "name=other")
    train(other, console=console)
    assert json.loads((other.run_dir / "environment.json").read_text())["commits"] == {"org/tiny": "b" * 40}


def _losses(recipe: Recipe) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_strangers_archives_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems beside answers, and rows: a small file that would fill the memory is refused before it does. Data files:
    tests/data."""
    bomb = tmp_path / "d.problems.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * (64 << 20)))
    monkeypatch.setattr(stored_answers, "MOST_PROBLEM_BYTES", 1 << 20)
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        stored_answers.read_problems(bomb)
    from opdkit.run import row_columns, rows

    table = pa.table(
        {
            name: pa.nulls(1 << 20, kind.type)
            for name, kind in zip(row_columns.SCHEMA.names, row_columns.SCHEMA, strict=True)
        }
    )
    path = tmp_path / "step_000001.parquet"
    pq.write_table(table.replace_schema_metadata(row_columns.SCHEMA.metadata), path, compression="zstd")
    monkeypatch.setattr(rows, "_MOST_VALUES", 1 << 22)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="values in one row group"):
        load_rows(path)
