"""What a run has beside its trainer: the engine that samples for it, and the answers that are asked for ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opdkit.metrics import Metric
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe, recipe_at
from opdkit.rollouts.single_turn import Answer
from opdkit.run.console import Console, Interrupt, told_while_waiting
from opdkit.training.ahead import Ahead
from opdkit.training.answers import Answers
from opdkit.training.models.student_server import StudentServer
from opdkit.training.parts import Parts
from opdkit.types import Problem


def look_ahead(recipe: Recipe, answers: Answers, problems_of: Callable[[int], Sequence[Problem]]) -> Ahead | None:
    """Who asks for the answers of later steps, if the recipe lets them lag."""
    if not recipe.sampling.lag:
        return None

    def begin(problems: Sequence[Problem], step: int, version: int) -> Callable[[], Sequence[Answer]]:
        return answers.begin(recipe_at(recipe, step), problems, step, version)

    is_beside = recipe.sampling.engine != "hf"
    return Ahead(recipe.sampling.lag, recipe.train.steps, begin, problems_of, is_beside, answers.ranks)


@contextmanager
def engine_beside(
    recipe: Recipe,
    parts: Parts,
    run_dir: Path,
    console: Console,
    interrupt: Interrupt,
    warn: Callable[[str], object],
    ranks: Ranks = ALONE,
) -> Iterator[StudentServer | None]:
    """The engine that samples for the student, if not this process; it is ended behind the block, whatever happens."""
    if recipe.sampling.engine == "hf":
        yield None
        return
    server = StudentServer.of(recipe, parts.student, parts.optimizer, run_dir, warn, ranks)
    try:
        what = "starting vLLM" if server.served.process else f"looking for {recipe.sampling.url}"
        with told_while_waiting(console, what) as tell:

            def waiting(seconds: float) -> None:
                tell(seconds)
                interrupt.check()

            server.open(waiting)
        yield server
    finally:
        server.close()


def beside_metrics(answers: Answers) -> list[Metric]:
    """Of the step that has ended; waits for what is still being written."""
    if answers.ahead is not None:
        answers.ahead.wait()
    return [] if answers.server is None else answers.server.drain()
