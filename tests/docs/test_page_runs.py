"""What docs/ and the README print runs in a fresh copy of the repository, page by page, in order: `make test-docs`.

What a page's reader brings along (`# needs: ...`) is a tiny stand-in; a block that needs anything else, or takes longer
(`# takes: ...`) than DOCS_MINUTES (default 5), is left out, and a report at the end of the page says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doc_pages import PAGES, ROOT, Block, blocks

pytestmark = [pytest.mark.docs, pytest.mark.timeout(7200)]

MINUTES = int(os.environ.get("DOCS_MINUTES", "5"))
MODELS = ("TEACHER", "STUDENT", "MODEL", "OTHER", "VERIFIER")
RECIPE = """name = "math"
model = { path = "STUDENT", dtype = "float32" }
teacher = { kind = "model", path = "TEACHER" }
data = { train = "train.jsonl", task = "math" }
sampling = { max_answer_tokens = 12 }
method = { name = "opd" }
train = { steps = 100, lr = 1e-4, problems_per_step = 2, save_every = 100, save_rows_every = 100 }
eval = { data = "test.parquet", limit = 4, samples = 2, every = 50 }
"""
TOOLS = (
    RECIPE.replace('"math"', '"tool_use"').replace("train.jsonl", "tools.jsonl").replace("test.parquet", "tools.jsonl")
)
VERL = {
    "actor_rollout_ref.model.path": "STUDENT",
    "data.train_files": "train.parquet",
    "data.max_response_length": 64,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "grpo",
}


def problems(start: int, count: int) -> list[dict[str, str]]:
    return [
        {"problem": f"What is {n} plus {n % 7}?", "solution": f"{n} plus {n % 7} is \\boxed{{{n + n % 7}}}."}
        for n in range(start, start + count)
    ]


class Place:
    """A folder with a copy of the repository, and what a reader would have put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
        for name in filter(None, files.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        programs = folder / ".programs"
        programs.mkdir()
        for name, words in {"opdkit": "-m opdkit.cli", "python": ""}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-eu", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{script}\nended with status {done.returncode}:\n{done.stdout[-4000:]}"
        return done.stdout


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    """The file or folder that stands in for a name, made once, when a page first asks for it; None: there is none."""
    place = Place(tmp_path_factory.mktemp("stand-ins"))
    folder = place.folder

    def lines(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("train.jsonl", problems(10, 60))
    lines("problems.jsonl", problems(10, 60))
    write_rows(folder / "train.parquet", problems(10, 60))
    write_rows(folder / "problems.parquet", problems(10, 60))
    write_rows(folder / "test.parquet", problems(200, 8))
    (folder / "data").mkdir(exist_ok=True)
    write_rows(folder / "data" / "test.parquet", problems(65, 8))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "run_mopd.sh").write_text(
        "python -m verl.trainer.main_ppo " + " ".join(f"{key}={value}" for key, value in VERL.items()) + "\n"
    )
    lines_of_yaml = {**VERL, "trainer.total_training_steps": 30}
    (folder / "experiment.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines_of_yaml.items()))
    calls = [
        {"prompt": f"Weather in {city}?", "answer": json.dumps([{"Action": "w", "Action_Input": {"city": city}}])}
        for city in ("Oslo", "Rome", "Lima", "Cairo")
    ]
    lines("tools.jsonl", calls)
    (folder / "tools.toml").write_text(TOOLS)

    made: dict[str, str] = {
        **{name: f"opdkit make-model {name} --data train.jsonl --hidden-size 32 --num-layers 1 --vocab-size 300 "
                 f"--steps 5 --seed {seed}" for seed, name in enumerate(MODELS)},
        "runs/math": "opdkit train recipe.toml",
        "runs/spooled": "opdkit train recipe.toml --set name=spooled --set spool.max_gib=1 "
                        "--set train.save_rows_every=1 --set train.steps=2",
        **{f"runs/{name}": f"cp -r runs/math runs/{name}" for name in ("a", "b", "sdpo")},
        "rows.parquet": "cp runs/math/rows/step_000100.parquet rows.parquet",
        "make quickstart": "opdkit quickstart",
        "runs/cold-start": "opdkit pipeline recipes/pipelines/cold_start_arithmetic.toml",
        "runs/cold-start-1": "opdkit pipeline recipes/pipelines/cold_start_arithmetic.toml --set name=cold-start-1",
        **{f"runs/evaluate/runs_{name}": f"opdkit evaluate --model {model} --data test.parquet --task math -n 2 "
                                         f"--max-answer-tokens 8 --out runs/evaluate/runs_{name}"
           for name, model in (("tiny", "TEACHER"), ("tinier", "STUDENT"))},
    }  # fmt: skip
    before = {"runs/math": MODELS[:2], "runs/spooled": MODELS[:2],
              "runs/a": ["runs/math"], "runs/b": ["runs/math"], "runs/sdpo": ["runs/math"],
              "rows.parquet": ["runs/math"], "runs/evaluate/runs_tiny": ["TEACHER"],
              "runs/evaluate/runs_tinier": ["STUDENT"], "recipe.toml": MODELS[:2]}  # fmt: skip
    done: set[str] = set()

    def get(name: str) -> Path | None:
        if name not in made and not (folder / name).exists():
            return None
        if name not in done:
            for other in before.get(name, ()):
                get(other)
            if name in made:
                place.run(made[name])
            done.add(name)
        return folder

    return get


# What a stand-in brings with it: models that a recipe names, every file that a run reads.
BRINGS = {
    "make quickstart": ["runs"],
    **{name: ["STUDENT", "TEACHER", "train.jsonl", "test.parquet", name] for name in
       ("recipe.toml", "runs/math", "runs/spooled", "runs/a", "runs/b", "runs/sdpo", "rows.parquet")},
    "tools.toml": ["tools.toml", "tools.jsonl", "STUDENT", "TEACHER"],
}  # fmt: skip


def bring(block: Block, place: Place, get: Callable[[str], Path | None]) -> str | None:
    """Put what the block needs into the place; the first thing that has no stand-in."""
    for need in block.needs:
        source = get(need)
        if source is None:
            return need
        for name in BRINGS.get(need, [need]):
            if get(name) is None and not (source / name).exists():
                return need
            target = place.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (source / name).is_dir():
                shutil.copytree(source / name, target, dirs_exist_ok=True)
            elif not target.exists():
                shutil.copy2(source / name, target)
    return None


WITH_COMMANDS = [page for page in PAGES if any(block.kind == "commands" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page: Path, stand_ins: Callable[[str], Path | None], tmp_path: Path) -> None:
    place = Place(tmp_path)
    left_out: list[str] = []
    run = 0
    for block in blocks(page):
        if block.kind == "python" and block.file_name:
            (tmp_path / block.file_name).write_text(block.text)
        if block.kind != "commands":
            continue
        if block.minutes > MINUTES:
            left_out.append(f"{block.where} takes {block.minutes} minutes (DOCS_MINUTES={MINUTES})")
        elif missing := bring(block, place, stand_ins):
            left_out.append(f"{block.where} needs {missing}")
        else:
            # `make` does its own set-up, which this run has; the tests do not run themselves.
            script = block.text.replace("make quickstart", "opdkit quickstart").replace("make test", ": make test")
            place.run(script)
            run += 1
    for line in left_out:
        print(f"not run: {line}")
    if not run:
        pytest.skip("; ".join(left_out))
