"""The answers of one training step, out of its saved rows, as if they were an evaluation's. No model, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.contexts.transcript import last_turn, whole_episodes
from opdkit.errors import UserError
from opdkit.run.folder import RunFolder
from opdkit.run.rows import load_rows
from opdkit.run.stored_answers import AnswerSet, stored_answer


def row_answers(run: Path, step: int | None) -> dict[str, AnswerSet]:
    """{training data: answers} of a step; None: the last one whose rows were saved.

    Raises UserError where no rows were saved, not those of that step, or no tokenizer is at hand to make them text.
    """
    folder = RunFolder(run)
    steps = folder.row_steps()
    if not steps:
        raise UserError(f"{run} saved no rows; set train.save_rows_every in its recipe, or compare its evaluations")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        near = min(steps, key=lambda saved: abs(saved - chosen))
        raise UserError(f"{run} saved no rows of step {chosen}; the nearest are those of step {near}, @rows-{near}")
    recipe = folder.read_whole_recipe()
    tokenizer = _tokenizer(run, recipe)
    examples = load_rows(folder.rows(chosen))
    rollouts = [replace(one, sample_id=one.episode_id) for one in whole_episodes([row.rollout for row in examples])]
    answers = [
        stored_answer(rollout, tokenizer.decode(list(last_turn(rollout)), skip_special_tokens=True))
        for rollout in rollouts
    ]
    name = str(recipe["data"]["train"])
    task = examples[0].problem.task if examples else None
    asked = {**recipe.get("sampling", {}), "step": chosen, "task": task, "episode": recipe.get("episode")}
    problems = {row.problem.id: row.problem for row in examples}
    return {name: AnswerSet(name=name, asked=asked, answers=answers, problems=problems)}


def _tokenizer(run: Path, recipe: Mapping[str, Any]) -> Any:
    """Of the run's checkpoints or its model's folder; only tokenizer.json is read."""
    from tokenizers import Tokenizer

    places = [*sorted(run.glob("checkpoints/step_*/model"), reverse=True), Path(recipe["model"]["path"])]
    for place in places:
        if (place / "tokenizer.json").is_file():
            try:
                return Tokenizer.from_file(str(place / "tokenizer.json"))
            except Exception as error:  # tokenizers raises bare Exception for a damaged file
                raise UserError(f"{place / 'tokenizer.json'} cannot be read ({error}); copy it again") from None
    raise UserError(
        f"no tokenizer.json is in {run}/checkpoints or {recipe['model']['path']}, so the rows of {run} cannot be made "
        "text; copy the model's there"
    )
