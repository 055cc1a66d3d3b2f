"""Tables of evaluations for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from opdkit.measure.intervals import FEW, side_of
from opdkit.run.console import Line, Table

if TYPE_CHECKING:
    from opdkit.evaluation.compare_runs import RunComparison
    from opdkit.evaluation.regrade import Changed, Regraded
    from opdkit.measure.accuracy import Accuracy
    from opdkit.measure.diversity import SetDiversity
    from opdkit.measure.intervals import Difference, Estimate

_MISSING = "-"
# Metrics of which less is better, or neither; the rest is better when it rises.
_LESS_IS_BETTER = ("truncated_rate",)
_NEITHER = ("answer_tokens",)


def evaluation_table(results: Mapping[str, Accuracy]) -> Table:
    """A row for each data set, narrow enough for 80 columns; what did not occur has no column."""
    samples = {found["samples"] for found in results.values()}
    n = f"{samples.pop()}" if len(samples) == 1 else "n"
    counts = {"num_truncated": "cut", "num_no_answer": "no answer", "num_ungraded": "ungraded"}
    counted = [key for key in counts if any(found[key] for found in results.values())]  # type: ignore[literal-required]
    titles = [
        "data",
        f"avg@{n}",
        "95 %",
        f"pass@{n}",
        f"maj@{n}",
        "format",
        "tokens",
        *(counts[key] for key in counted),
    ]
    table = Table(*titles, is_plain=True)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for name, found in results.items():
        avg, passes = found["avg_at_n"], found["pass_at_k"].get(str(found["samples"]))
        low, high = avg["low"], avg["high"]
        table.add_row(
            name,
            _number("avg", avg["value"]),
            _MISSING if low is None or high is None else f"{low:.3f}-{high:.3f}",
            _number("pass", passes["value"] if passes else None),
            _number("maj", found["maj_at_n"]["value"]),
            _number("format_rate", found["format_rate"]["value"]),
            _number("answer_tokens", found["answer_tokens"]["value"]),
            *(str(found[key]) for key in counted),  # type: ignore[literal-required]
        )
    return table


def comparison_tables(result: RunComparison) -> Iterator[Table | Line]:
    """One table a data set, each followed by what must be known about it."""
    yield Line(f"A  {result['a']}")
    yield Line(f"B  {result['b']}")
    for name, found in result["sets"].items():
        n = {found["samples_a"], found["samples_b"]}
        samples = f"{min(n)}" if len(n) == 1 else f"{found['samples_a']} (A) and {found['samples_b']} (B)"
        table = Table(
            "metric", "A", "B", "B - A", "95 % interval", "",
            title=f"{name}: {found['problems']} problems, {samples} answers each", title_justify="left",
        )  # fmt: skip
        table.columns[0].no_wrap = True
        for column in table.columns[1:5]:
            column.justify = "right"
        for metric, difference in found["metrics"].items():
            table.add_row(metric, *_cells(metric, difference))
        yield table
        for note in found["notes"]:
            yield _note(note)
    mean = result["mean_over_sets"]
    if mean is not None:
        words = f"mean over {len(result['sets'])} data sets, avg, B - A: {_number('avg', mean['value'], signed=True)}"
        yield Line((f"{words} {_range('avg', mean)} ", "bold"), _verdict("avg", mean))
    for note in result["notes"]:
        yield _note(note)


def regraded_lines(found: Sequence[Regraded], examples: int) -> Iterator[Line]:
    """What became of every data set, and the first changed verdicts."""
    for one in found:
        before = None if one.before is None else one.before["avg_at_n"]["value"]
        after = one.after["avg_at_n"]["value"]
        numbers = f"avg@{one.after['samples']} {_number('avg', before)} -> {_number('avg', after)}"
        yield Line((one.name, "bold"), f": {one.num_answers} answers graded again, {numbers}")
        for kind, count in one.kinds().most_common():
            yield Line(f"  {count} {kind}")
        if one.num_reread:
            yield Line(f"  {one.num_reread} with the same verdict and another final answer")
        for changed in one.changed[:examples]:
            yield from _example(changed)
        if len(one.changed) > examples:
            yield Line(f"    ... and {len(one.changed) - examples} more")


_END = 160  # characters of an answer's end that are shown


def _example(changed: Changed) -> Iterator[Line]:
    old, new = changed.old, changed.new
    yield Line(
        f"    {changed.problem.id} sample {new.sample_id}: {_reward(old.reward)} -> {_reward(new.reward)}, gold "
        f"{changed.problem.gold!r}, read {old.parsed!r} -> {new.parsed!r}"
    )
    yield Line(f"      ...{' '.join(new.text[-_END:].split())}")


def _reward(reward: float | None) -> str:
    return "ungraded" if reward is None else f"{reward:g}"


def diversity_tables(results: Mapping[str, SetDiversity]) -> Iterator[Table | Line]:
    """A row for each measure, a column for each run; below a value, its difference to the first run."""
    for name, found in results.items():
        runs = list(found["runs"])
        title = f"{name}: {found['problems']} problems, at most {found['answers_each']} answers each"
        table = Table("measure", *runs, "problems", title=title, title_justify="left")
        table.columns[0].no_wrap = True
        keys = dict.fromkeys(key for run in found["runs"].values() for key in run["measures"])
        for key in keys:
            if not key.startswith("pass@") or _is_shown(int(key.removeprefix("pass@")), found["answers_each"]):
                table.add_row(key, *(_measure(found, run, key) for run in runs), _defined(found, key))
        yield table
        if found["problems"] < FEW:
            yield _note(f"{found['problems']} problems are too few to tell runs apart")
        for run, count in found["left_out"].items():
            if count:
                yield _note(f"{count} problems of {run} are not in all runs: left out")
        for run, one in found["runs"].items():
            if one["num_unparsed_programs"]:
                yield _note(f"{one['num_unparsed_programs']} programs of {run} do not parse")


def _note(sentence: str) -> Line:
    return Line(("note", "yellow"), f" {sentence}")


def _is_shown(k: int, n: int) -> bool:
    return k & (k - 1) == 0 or k == n


def _measure(found: SetDiversity, run: str, key: str) -> str:
    one = found["runs"][run]
    value = _number(key, one["measures"][key]["value"]) if key in one["measures"] else _MISSING
    difference = (one["difference"] or {}).get(key)
    if difference is None or difference["value"] is None:
        return value
    return f"{value}\n{_number(key, difference['value'], signed=True)} {_range(key, difference)}"


def _defined(found: SetDiversity, key: str) -> str:
    """Over how many problems the means are."""
    counts = {run["measures"][key]["problems"] for run in found["runs"].values() if key in run["measures"]}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _cells(metric: str, difference: Difference) -> list[str | Line]:
    return [
        _number(metric, difference["before"]),
        _number(metric, difference["after"]),
        Line((_number(metric, difference["value"], signed=True), "bold")),
        _range(metric, difference),
        Line(_verdict(metric, difference)),
    ]


def _verdict(metric: str, estimate: Estimate) -> str | tuple[str, str]:
    """In its colour; only where the interval leaves zero out, or is of too few problems."""
    side = side_of(estimate)
    if side == "unsettled":
        return ""
    if side == "too_few":
        return "too few to tell"
    if metric in _NEITHER:
        return "more" if side == "above" else "less"
    better = (side == "above") != (metric in _LESS_IS_BETTER)
    return ("B better", "green") if better else ("A better", "red")


def _range(metric: str, estimate: Estimate) -> str:
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return _MISSING
    return f"[{_number(metric, low, signed=True)}, {_number(metric, high, signed=True)}]"


def _number(metric: str, value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return _MISSING
    digits = 1 if metric == "answer_tokens" else 3
    rounded = round(value, digits) + 0.0  # not -0.000
    return f"{rounded:{'+' if signed else ''}.{digits}f}"
