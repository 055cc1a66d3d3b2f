"""A tiny teacher with random weights, and a run whose rows hold right and wrong answers to a dozen problems."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opdkit import toml
from opdkit.tasks import arithmetic
from opdkit.types import Example, Rollout

WORDING = {  # no place for summaries and feedback
    "layout": "{success}{another}{failure}{question}",
    "success": "({text})",
    "another": "({text})",
    "failure": "[{text}]",
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from opdkit.engines.scratch import char_tokenizer, make_model

    folder = tmp_path_factory.mktemp("models")
    for name, alphabet, seed in (("teacher", "()[]", 1), ("student", "()[]", 2), ("stranger", "[]()", 1)):
        make_model(
            folder / name,
            tokenizer=char_tokenizer(arithmetic.ALPHABET + alphabet),
            hidden_size=32,
            num_layers=1,
            seed=seed,
            max_positions=128,
        )
    return {name: folder / name for name in ("teacher", "student", "stranger")}


@pytest.fixture
def console() -> Console:
    return Console(width=200, force_terminal=False)


def _rollout(tokenizer: Any, problem: Any, sample: int, version: int) -> Rollout:
    right = sample % 2 == 0
    text = (arithmetic.random_solution if right else arithmetic.wrong_solution)(problem, sample)
    answer = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    prompt = tokenizer.apply_chat_template(
        [dict(turn) for turn in problem.messages], add_generation_prompt=True, tokenize=False
    )
    return Rollout(
        problem_id=problem.id,
        sample_id=sample,
        policy_version=version,
        prompt_ids=tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
        answer_ids=answer,
        answer_logprobs=None,
        answer_mask=np.ones(len(answer), dtype=np.bool_),
        finish="stop",
        reward=float(right),
        parsed=None,
        feedback=None if right else "0",
    )


@pytest.fixture(scope="session")
def make_run(models: dict[str, Path]) -> Callable[..., Path]:
    """make_run(folder, recipe sections): two steps of 6 problems with 6 answers; one problem is in both."""
    from transformers import AutoTokenizer

    from opdkit.run.rows import save_rows

    tokenizer = AutoTokenizer.from_pretrained(models["student"])
    problems = arithmetic.problems("merge-3", "train", 11, 0)

    def make(folder: Path, **sections: Any) -> Path:
        (folder / "rows").mkdir(parents=True)
        for step, chosen in ((0, problems[:6]), (1, problems[5:])):
            rows = [
                Example(problem=problem, rollout=_rollout(tokenizer, problem, sample, step))
                for problem in chosen
                for sample in range(6)
            ]
            save_rows(folder / "rows" / f"step_{step:06d}.parquet", rows)
        recipe = {"model": {"path": str(models["student"])}, "context": {"kind": "peers", "wording": WORDING}}
        (folder / "recipe.toml").write_text(toml.dumps(recipe | sections))
        return folder

    return make
