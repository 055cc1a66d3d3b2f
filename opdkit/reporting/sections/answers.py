"""The answers of the last saved rows, problem by problem, and the controls that find some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from opdkit.reporting.figures.heatmap import legend, signal_scale
from opdkit.reporting.figures.tokens import Decode
from opdkit.reporting.html.document import small
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.run import RunContents
from opdkit.reporting.sections.group import Group, Step, group_of_answers, groups_of, kinds
from opdkit.types import Example

NUM_GROUPS = 60  # problems on the page, so that it opens quickly
NUM_COLOURED = 30_000  # tokens of the page that get a colour and a note
KINDS: dict[str, str] = {
    "right": "reward 1 or more",
    "between": "reward between 0 and 1",
    "wrong": "reward 0 or less",
    "ungraded": "not graded",
    "cut": "cut at the length limit",
    "untaught": "taught nothing",
    "peers": "teacher was shown peers",
    "turns": "several turns",
    "answer": "episode ended by an answer",
    "done": "episode ended by the environment",
    "turn_limit": "episode ended at the limit of turns",
    "token_limit": "episode ended at the limit of tokens",
    "invalid": "episode ended by calls that cannot be read",
    "repeat": "episode ended by one call over and over",
    "failure": "episode failed in the environment",
}
OUTCOMES = ("right", "between", "wrong", "ungraded")


def answers(run: RunContents, decode: Decode | None) -> Html:
    """The groups of the best and the worst problems in turn, each closed but the first. Without `decode`: token ids."""
    groups = groups_of(run.rows)
    chosen = _in_turn(groups)[:NUM_GROUPS]
    told = f"{len(run.rows):,} answers to {len(groups):,} problems were saved at step {run.rows_step}."
    if len(chosen) < len(groups):
        told += f" Of the problems {len(chosen):,} are on this page, those with the highest and the lowest mean reward."
    if decode is None:
        told += (
            " They are shown as token ids: no tokenizer.json was found in the run, at model.path or in the hub's cache."
        )
    some = [row for group in chosen for row in group.rows]
    step = Step(run.rows, signal_scale(run.rows), decode, NUM_COLOURED)
    shown = [group_of_answers(group, place, step) for place, group in enumerate(chosen)]
    uncoloured = ""
    if step.num_uncoloured:
        most = f"a page has at most {NUM_COLOURED:,} tokens with notes"
        uncoloured = f" {step.num_uncoloured:,} answers further down are plain text: {most}."
    return join(small(told + uncoloured), legend(some), _controls(some, step), tag("div", *shown, class_="groups"))


def _in_turn(groups: Sequence[Group]) -> list[Group]:
    """The best, the worst, the next best, ...; of equal ones those whose answers differ come first; then ungraded."""
    graded = [group for group in groups if group.mean is not None]
    ordered = sorted(graded, key=lambda group: (-(group.mean or 0.0), not group.is_mixed))
    pairs = [group for best, worst in zip(ordered, reversed(ordered), strict=True) for group in (best, worst)]
    return [*pairs[: len(ordered)], *(group for group in groups if group.mean is None)]


def _controls(rows: Sequence[Example], step: Step) -> Html:
    """Hidden where no script runs: nothing would come of them."""
    counts = Counter(kind for row in rows for kind in kinds(row, step))
    outcomes = _choice("any reward", "only", [(name, KINDS[name]) for name in OUTCOMES if counts[name]], counts)
    traits = _choice("all", "only", [(name, words) for name, words in KINDS.items() if counts[name]
                                     and name not in OUTCOMES and counts[name] < len(rows)], counts)  # fmt: skip
    orders = [("page", "best and worst in turn"), ("low", "lowest mean reward first"),
              ("high", "highest mean reward first"), ("loss", "most of the loss first")]  # fmt: skip
    order = tag("select", *(tag("option", words, value=name) for name, words in orders), name="order",
                aria_label="order of the problems")  # fmt: skip
    search = tag("input", type="search", placeholder="Search questions and answers",
                 aria_label="search questions and answers")  # fmt: skip
    return tag("div", search, outcomes, traits, order, tag("output", role="status"), class_="controls", hidden="hidden")


def _choice(everything: str, name: str, options: Sequence[tuple[str, str]], counts: Counter[str]) -> Html | None:
    """None where there is nothing to choose."""
    if not options:
        return None
    shown = [tag("option", f"{words} ({counts[value]:,})", value=value) for value, words in options]
    return tag("select", tag("option", everything, value=""), *shown, name=name, aria_label="only these answers")
