"""Before and after on the same held-out problems: the paired difference, and the problems that moved most.

Reads the answers that a run keeps beside its evaluations (eval/step_000000.jsonl, ...); runs without them have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opdkit.errors import UserError
from opdkit.measure.accuracy import problem_scores
from opdkit.measure.intervals import Difference, paired_difference
from opdkit.reporting.html.document import small, table
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import score
from opdkit.reporting.run import RunContents
from opdkit.run.answer_sets import read_answers
from opdkit.run.stored_answers import AnswerSet

NUM_SHOWN = 8  # of those that gained, and of those that lost


@dataclass(frozen=True, slots=True)
class Moved:
    """Mean reward of each problem that both evaluations graded."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    difference: Difference

    def by_gain(self) -> list[str]:
        """The most gained first."""
        return sorted(self.before, key=lambda name: (self.before[name] - self.after[name], name))


def moved(run: RunContents) -> tuple[dict[str, Moved], list[str]]:
    """Data set -> its problems, and a sentence about answers that are there and cannot be read.

    Empty where the answers were not kept, or there is one evaluation only.
    """
    if len(list((run.folder / "eval").glob("step_*.jsonl"))) < 2:
        return {}, []
    try:
        sides = [_means(read_answers(run.folder, which)) for which in ("before", "after")]
    except UserError as error:
        return {}, [f"{error}: the problems of before and after are not compared."]
    found: dict[str, Moved] = {}
    for dataset in sides[0].keys() & sides[1].keys():
        both = sides[0][dataset].keys() & sides[1][dataset].keys()
        before, after = ({name: side[dataset][name] for name in both} for side in sides)
        if both:
            found[dataset] = Moved(before, after, paired_difference(before, after))
    return found, []


def _means(sets: Mapping[str, AnswerSet]) -> dict[str, dict[str, float]]:
    """Data set -> problem -> mean reward of its graded answers."""
    scores = {name: problem_scores(one.answers) for name, one in sets.items() if one.answers}
    return {
        name: {each.problem_id: each.mean_reward for each in found if each.mean_reward is not None}
        for name, found in scores.items()
    }


def held_out(one: Moved) -> Html:
    """Who gained and who lost."""
    names = one.by_gain()
    gained = [name for name in names if one.after[name] > one.before[name]]
    lost = [name for name in reversed(names) if one.after[name] < one.before[name]]
    told = (
        f"Of {len(names):,} problems, {len(gained):,} have a higher mean reward than before, {len(lost):,} a lower "
        f"one, {len(names) - len(gained) - len(lost):,} the same."
    )
    tables = [_table("Gained most", gained[:NUM_SHOWN], one), _table("Lost most", lost[:NUM_SHOWN], one)]
    more = tag("details", tag("summary", "Problems that moved most"), tag("div", *tables, class_="columns"))
    return join(small(told), more if gained or lost else None)


def _table(title: str, names: Sequence[str], one: Moved) -> Html | None:
    if not names:
        return None
    return table(
        [title, "before", "after"], [[name, score(one.before[name]), score(one.after[name])] for name in names]
    )
