"""From scores.jsonl to metrics.json, metrics.csv, report.md and two figures. No model, no torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.analysis.signal.conditions import PEERS
from opdkit.analysis.signal.parts import METRICS_FILE, SCORES_FILE, Row, read_whole
from opdkit.analysis.signal.plots import by_difficulty, main_figure
from opdkit.analysis.signal.scores import scored_answers
from opdkit.errors import UserError
from opdkit.measure.intervals import FEW, Estimate, side_of
from opdkit.measure.ranking import METRICS, Definitions
from opdkit.measure.signal import BASE, SAMPLE_SETS, SampleSet, SampleSetSignal, signal_metrics
from opdkit.reporting.html.numbers import UNKNOWN, compact, score, share
from opdkit.run.folder import atomic_write

VERSION = 2
MANY = 8  # conditions; of more, the report shows the pairs of those that show peers and nothing else
SHOWN: SampleSet = "both_present_effective_only"  # what the report and the figures show
TABLE = {  # the columns of the published table
    "spearman": "Spearman",
    "kendall_tau": "Kendall",
    "pairwise_accuracy": "pairwise",
    "success_auc": "AUC",
    "top1_hit_rate": "top-1",
}


def write_metrics(folder: Path, *, definitions: Definitions, seed: int, resamples: int) -> list[Path]:
    """metrics.json and metrics.csv. Raises UserError where scores are missing or none can be measured."""
    header, rows = read_whole(folder / SCORES_FILE, "scores")
    answers = scored_answers(rows, definitions)
    contexts = header["contexts"]
    measured = signal_metrics(
        answers, definitions=definitions, seed=seed, resamples=resamples, order=list(contexts["shows"])
    )
    unread = Counter(row["condition"] for row in rows if row["score"] is None)
    result = {
        "version": VERSION,
        "teacher": {key: header["identity"][key] for key in ("model", "model_files", "dtype")},
        "answers": contexts["answers"],
        "design": contexts["identity"]["design"],
        "context": contexts["identity"]["context"],
        "template": contexts["template"],
        "conditions": contexts["shows"],
        "definitions": definitions,
        "bootstrap": {"resamples": resamples, "seed": seed} if definitions == "published" else None,
        "counts": {**contexts["counts"], "scores_too_long_for_the_teacher": dict(unread)},
        "sample_sets": measured,
    }
    written = {METRICS_FILE: json.dumps(result, indent=1, allow_nan=False) + "\n", "metrics.csv": _csv(measured)}
    return _write(folder, written)


def write_plots(folder: Path) -> list[Path]:
    """The figures and report.md, from metrics.json alone."""
    result = _read_metrics(folder / METRICS_FILE)
    shown, _ = _shown(result)
    written = {"report.md": _report(result)}
    if shown:
        written |= {"signal.svg": main_figure(shown), "signal_by_difficulty.svg": by_difficulty(shown)}
    else:  # figures of other numbers would stand beside these
        for name in ("signal.svg", "signal_by_difficulty.svg"):
            (folder / name).unlink(missing_ok=True)
    return _write(folder, written)


def _write(folder: Path, written: Mapping[str, str]) -> list[Path]:
    for name, text in written.items():
        atomic_write(folder / name, text)
    return [folder / name for name in written]


def _read_metrics(path: Path) -> Row:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["version"] != VERSION:
            raise UserError(f"{path} is of version {result['version']} and this opdkit reads {VERSION}; make it again")
        return dict(result)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: run the step metrics first, with --steps metrics") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error!r}); make it again with --steps metrics") from None


def _csv(measured: Mapping[SampleSet, SampleSetSignal]) -> str:
    """One line a number: what a spreadsheet or data frame wants."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["sample_set", "paired", "condition", "difficulty", "metric", "value", "low", "high", "problems", "undefined"]
    )
    for name in SAMPLE_SETS:
        for kind, parts in (("conditions", measured[name]["conditions"]), ("paired", measured[name]["paired"])):
            for condition, part in parts.items():
                for bucket, metric, estimate in _numbers(part):
                    numbers = ["" if x is None else x for x in (estimate["value"], estimate["low"], estimate["high"])]
                    counted = [estimate["problems"], estimate.get("undefined", "")]
                    writer.writerow([name, int(kind == "paired"), condition, bucket, metric, *numbers, *counted])
        for pair in measured[name]["pairs"]:
            for kind, differences in (("", pair["difference"]), (" without copies", pair["without_copies"])):
                for metric, estimate in (differences or {}).items():
                    numbers = ["" if x is None else x for x in (estimate["value"], estimate["low"], estimate["high"])]
                    what = f"{metric}-{pair['minus']}{kind}"
                    writer.writerow([name, 0, pair["condition"], "all", what, *numbers, estimate["problems"], ""])
    return text.getvalue()


def _numbers(part: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for metric in METRICS:
        yield "all", metric, part["metrics"][metric]
    for bucket, metrics in part["by_bucket"].items():
        yield from ((bucket, metric, metrics[metric]) for metric in METRICS)


# --- report.md ------------------------------------------------------------------------------------------------------


def _shown(result: Row) -> tuple[Mapping[str, Any], bool]:
    """(conditions, whether they are over the same problems): those that all share, or, where there are none, each over
    its own."""
    part = result["sample_sets"][SHOWN]
    return (part["paired"], True) if part["paired"] else (part["conditions"], False)


def _report(result: Row) -> str:
    shown, shared = _shown(result)
    parts = ["# Can this teacher's signal be trusted?", *_setting(result)]
    if not shown:
        parts.append(
            "No problem has a right and a wrong answer among those scored, so nothing can be ranked by success. "
            "metrics.json holds what could be measured."
        )
    else:
        over = "the problems that all conditions share" if shared else "the problems of each, for they share none"
        own = result["sample_sets"][SHOWN]["conditions"]
        parts += [_findings(own), "![metrics by condition](signal.svg)", f"Over {over}:", _table(shown)]
        parts += [
            _pairs(result["sample_sets"][SHOWN]["pairs"], list(own)),
            "![the same by difficulty](signal_by_difficulty.svg)",
        ]
    parts += ["## Conditions", _conditions(result), "## Counts", _counts(result), _reading()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(result: Row) -> list[str]:
    counts = result["counts"]
    designs = {
        "fixed": "All answers of a problem are read behind the same context, made of answers that are held out "
        "(own feedback apart), and every condition scores the same answers.",
        "siblings": "Each answer is read behind its own siblings, as in training: the ranking mixes the answers with "
        "what was shown beside them.",
    }
    read = result["answers"]
    source = f"`{read['path']}`" if "path" in read else f"`{read['model']}` to `{read['data']}`"
    return [
        f"Teacher `{result['teacher']['model']}` ({result['teacher']['dtype']}); answers of {source}: "
        f"{counts['answers_scored']:,} scored, of {counts['problems']:,} problems. {designs[result['design']]}"
    ]


def _findings(conditions: Mapping[str, Any]) -> str:
    """What the AUC says, in a sentence or two."""
    if BASE not in conditions:
        return "`base` was not scored, so there is nothing to compare the conditions with."
    auc = conditions[BASE]["metrics"]["success_auc"]
    verdict = {
        "above": "better than chance",
        "below": "worse than chance",
        "unsettled": "not told apart from chance",
        "too_few": f"too few to tell (below {FEW} problems nothing is called better or worse)",
    }[side_of(auc, at=0.5)]
    gains = {
        name: side_of(part["difference_to_base"]["success_auc"])
        for name, part in conditions.items()
        if part["difference_to_base"] is not None
    }
    better, worse, few = ([name for name in gains if gains[name] == side] for side in ("above", "below", "too_few"))
    too_few = f" Too few problems to tell: {_listed(few)}." if few else ""
    return (
        f"Over {auc['problems']} problems with right and wrong answers, the teacher without context ranks a right "
        f"answer above a wrong one with AUC {_range(auc)}, which is {verdict}. Contexts that raise it: "
        f"{_listed(better)}; that lower it: {_listed(worse)} (the 95 % interval of the paired difference does not hold "
        f"0; not corrected for the number of conditions).{too_few}"
    )


def _table(conditions: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`{name}`",
            f"{part['problems']:,}",
            f"{part['answers']:,}",
            compact(part["mean_context_tokens"]),
            *(_range(part["metrics"][metric]) for metric in TABLE),
        ]
        for name, part in conditions.items()
    ]
    return _markdown(["condition", "problems", "answers", "context tokens", *TABLE.values()], rows)


def _pairs(pairs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Any two conditions: AUC, over the answers that both could fully show, and again without copies of what is shown.

    Of many conditions: those to base, and those between conditions that show peers and nothing else.
    """
    shown = [
        pair
        for pair in pairs
        if len(names) <= MANY or pair["minus"] == BASE or {pair["condition"], pair["minus"]} <= PEERS
    ]
    if not shown:
        return ""
    rows = []
    for pair in shown:
        without = pair["without_copies"]
        row = [f"`{pair['condition']}` - `{pair['minus']}`", *_difference(pair["difference"]["success_auc"])]
        if without is not None:
            row += [share(pair["copies"], pair["answers"]), *_difference(without["success_auc"])]
        rows.append([*row, *[UNKNOWN] * (8 - len(row))])
    head = ["AUC of", "problems", "difference", "", "answers equal to a shown one", "problems", "without them", ""]
    left_out = len(pairs) - len(shown)
    more = f" {left_out} more pairs are in metrics.json and metrics.csv." if left_out else ""
    said = f"Differences of any two conditions, paired by problem, over the answers scored under both.{more}"
    return f"{said}\n\n{_markdown(head, rows)}"


def _difference(estimate: Estimate) -> list[str]:
    said = {"above": "higher", "below": "lower", "unsettled": "not settled", "too_few": "too few to tell"}
    return [f"{estimate['problems']:,}", _range(estimate, signed=True), said[side_of(estimate)]]


def _conditions(result: Row) -> str:
    found = result["sample_sets"]["all_samples"]["conditions"]
    effective = result["sample_sets"]["effective_only"]["conditions"]
    rows = []
    for name, shows in result["conditions"].items():
        whole = found[name]["answers"] if name in found else 0
        had = effective[name]["answers"] if name in effective else 0
        cut = found[name]["truncation_rate"] if name in found else None
        rows.append([f"`{name}`", shows, share(had, whole) if whole else UNKNOWN, score(cut)])
    return _markdown(["condition", "shows", "answers that had all of it", "share cut"], rows)


def _counts(result: Row) -> str:
    too_long = result["counts"]["scores_too_long_for_the_teacher"]
    lines = [
        f"- {name.replace('_', ' ')}: {count:,}"
        for name, count in result["counts"].items()
        if not isinstance(count, Mapping) and count
    ]
    lines += [f"- too long for the teacher under `{name}`: {count:,}" for name, count in too_long.items()]
    return "\n".join(lines)


def _reading() -> str:
    return (
        "A score is the mean log-prob of the answer's tokens. Intervals are 95 %, over problems. A metric "
        "that is not defined on a problem leaves its mean, and is counted in metrics.json. Shown is the sample set `"
        + SHOWN
        + "` "
        "(problems with right and wrong answers, where the condition could show all it shows); the others are in "
        "metrics.json and metrics.csv."
    )


def _range(estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return UNKNOWN
    form = "{:+.3f}" if signed else "{:.3f}"
    if low is None or high is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "none"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
