"""Sampled answers of the last saved rows: the best and the worst, as the model wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opdkit.report.markup import Html, tag
from opdkit.report.numbers import compact
from opdkit.report.run import Run
from opdkit.types import Example

NUM_SHOWN = 5  # of the best, and of the worst

Decode = Callable[[Sequence[int]], str]


def answers(run: Run, decode: Decode | None) -> Html:
    """Two columns of cards. Without `decode` the answers are shown as token ids."""
    graded = sorted((row for row in run.rows if row.rollout.reward is not None), key=_reward)
    if not graded:
        columns = {"Not graded": list(run.rows)}
    elif _reward(graded[0]) == _reward(graded[-1]):
        columns = {f"All rewarded {compact(_reward(graded[0]))}": graded}
    else:
        middle = (_reward(graded[0]) + _reward(graded[-1])) / 2
        columns = {
            "Best": [row for row in reversed(graded) if _reward(row) >= middle],
            "Worst": [row for row in graded if _reward(row) < middle],
        }
    shown = [_column(title, _one_per_problem(rows), decode) for title, rows in columns.items()]
    return tag("div", *shown, class_="columns")


def tokenizer_decode(run: Run) -> Decode | None:
    """The decoder of the run's tokenizer, special tokens included; None if its file is not on this machine.

    Only `tokenizer.json` is read, from the run's own checkpoint, the model's folder or the hub's cache: no network, no
    model code, and no torch.
    """
    from tokenizers import Tokenizer

    for path in _tokenizer_files(run):
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception:  # tokenizers raises bare Exception for a damaged file; the next place may hold a good one
                continue
            return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
    return None


def _tokenizer_files(run: Run) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = (run.summary or {}).get("model")
    files = [run.folder / name / "tokenizer.json"] if isinstance(name, str) else []
    files += sorted(run.folder.glob("checkpoints/step_*/model/tokenizer.json"), reverse=True)
    model = run.setting("model", "path")
    if isinstance(model, str):
        files.append(Path(model) / "tokenizer.json")
        try:
            cached = try_to_load_from_cache(model, "tokenizer.json")
        except HFValidationError:  # it is a path, not a hub id
            cached = None
        if isinstance(cached, str):
            files.append(Path(cached))
    return files


def _column(title: str, rows: Sequence[Example], decode: Decode | None) -> Html:
    return tag("section", tag("h3", title), *(_card(row, decode) for row in rows))


def _card(row: Example, decode: Decode | None) -> Html:
    rollout = row.rollout
    text = decode(rollout.answer_ids) if decode else " ".join(map(str, rollout.answer_ids))
    turns = [_turn(str(message.get("role", "")), str(message.get("content", ""))) for message in row.problem.messages]
    return tag(
        "article",
        _chips(row),
        *turns,
        tag("p", "answer" if decode else "answer, as token ids", class_="role"),
        tag("pre", text, class_="answer"),
        tag("p", "feedback", class_="role") if rollout.feedback else None,
        tag("pre", rollout.feedback) if rollout.feedback else None,
    )


def _turn(role: str, content: str) -> Html:
    return tag("div", tag("p", role, class_="role"), tag("pre", content))


def _chips(row: Example) -> Html:
    rollout = row.rollout
    facts: list[tuple[str, str | None, str | None]] = [
        ("reward", None if rollout.reward is None else compact(rollout.reward), _tone(rollout.reward)),
        ("read as", rollout.parsed, None),
        ("gold", row.problem.gold, None),
        ("tokens", f"{len(rollout.answer_ids):,}", None),
        ("cut at the length limit", "" if rollout.finish == "length" else None, "bad"),
        ("problem", row.problem.id, None),
    ]
    chips = [
        tag("span", f"{name} " if value else name, tag("bdi", value) if value else None, class_=tone)
        for name, value, tone in facts
        if value is not None
    ]
    return tag("div", *chips, class_="chips")


def _tone(reward: float | None) -> str | None:
    return None if reward is None else "good" if reward >= 1 else "bad" if reward <= 0 else None


def _one_per_problem(rows: Sequence[Example]) -> list[Example]:
    """The first rows, each of another problem."""
    chosen: dict[str, Example] = {}
    for row in rows:
        chosen.setdefault(row.problem.id, row)
    return list(chosen.values())[:NUM_SHOWN]


def _reward(row: Example) -> float:
    assert row.rollout.reward is not None
    return row.rollout.reward
