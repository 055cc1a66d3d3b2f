"""How often the student solves each problem before its first step: what PACED weighs problems by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opdkit.engines.load import model_digest
from opdkit.evaluation.evaluate import sample_answers
from opdkit.methods.weighting import Paced
from opdkit.recipe import Recipe, stages_of
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.stored_answers import Store
from opdkit.run.sums import note_so_far
from opdkit.training.answers import Answers
from opdkit.types import Problem


def measure_pass_rates(
    recipe: Recipe,
    problems: Sequence[Problem],
    data_fingerprint: str,
    answers: Answers,
    kept_in: Path,
    console: Console,
    interrupt: Interrupt,
) -> dict[str, float]:
    """{problem id: share of its graded answers that are right}, with the student of this moment; {} if nobody asks.

    Sampled as the recipe samples. Answers are kept as they come, so a run that was stopped here goes on. A problem
    without a graded answer has no rate. Raises Interrupted.
    """
    asking = _asking(recipe)
    if not asking:
        return {}
    num_samples, threshold = max(weight.samples for weight in asking), asking[0].success_threshold
    identity = {
        "purpose": "pass rates before training",
        "seed": recipe.seed,
        "sampling": recipe.sampling.params.identity,
        "data": data_fingerprint,
        "model": model_digest(Path(recipe.model.path)) or recipe.model.path,
    }
    store = Store(kept_in, identity) if answers.ranks.is_first else None
    label = f"pass rates of {len(problems)} problems, {num_samples} answers each"
    with Bar(console, label, len(problems) * num_samples) as bar:

        def heard(done: int, total: int) -> None:
            bar.update(done)
            interrupt.check()

        found = sample_answers(
            problems,
            sampler=answers.student_engine(0),
            renderer=answers.renderer,
            task=answers.task,
            params=recipe.sampling.params,
            num_samples=num_samples,
            seed=recipe.seed,
            store=store,
            progress=heard,
            ranks=answers.ranks,
        )
    if store is not None:
        note_so_far(kept_in)
    rewards: dict[str, list[float]] = {}
    for answer in found:
        if answer.reward is not None:
            rewards.setdefault(answer.problem_id, []).append(answer.reward)
    rates = {problem: sum(r >= threshold for r in got) / len(got) for problem, got in rewards.items()}
    partly = sum(0 < rate < 1 for rate in rates.values())
    say(console, f"{label}: {partly} are solved sometimes, but not always")
    return rates


def _asking(recipe: Recipe) -> list[Paced]:
    """The weights that ask for measured rates, of any stage."""
    problems = [stage.weights.problems for stage in stages_of(recipe).values()]
    return [weight for weight in problems if isinstance(weight, Paced) and weight.pass_rate == "measured"]
