"""Sampled answers of the last saved rows: the best and the worst, token by token, beside what the teacher was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdkit.reporting.figures.heatmap import NUM_COLOURED, Decode, heat_map, legend, signal_scale
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import compact, shortened
from opdkit.reporting.run import RunContents
from opdkit.types import Example, Rollout

NUM_SHOWN = 5  # of the best, and of the worst

Key = tuple[str, int]  # (problem id, sample id)


def answers(run: RunContents, decode: Decode | None) -> Html:
    """Two columns of cards, or one where peers stand beside the answers. Without `decode`: token ids."""
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
    chosen = {title: _one_per_problem(rows) for title, rows in columns.items()}
    step = _Step({row.rollout.key: row for row in run.rows}, signal_scale(run.rows), decode)
    shown = [tag("section", tag("h3", title), *(_card(row, step) for row in rows)) for title, rows in chosen.items()]
    some = [row for rows in chosen.values() for row in rows]
    with_peers = any(row.view and row.view.sources for row in some)
    return join(legend(some), tag("div", *shown, class_="column" if with_peers else "columns"))


@dataclass(frozen=True, slots=True)
class _Step:
    """What a card needs to know beside its own row."""

    rows: Mapping[Key, Example]
    scale: float  # of the heat-map's colours
    decode: Decode | None

    def text(self, ids: Sequence[int]) -> str:
        return shortened(self.decode(ids) if self.decode else " ".join(map(str, ids)))

    def left_out(self, row: Example) -> bool:
        """The loss read other rows, and not this one."""
        return row.taught is None and any(other.taught for other in self.rows.values())


def tokenizer_decode(run: RunContents) -> Decode | None:
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


def _tokenizer_files(run: RunContents) -> list[Path]:
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


def _card(row: Example, step: _Step) -> Html:
    rollout, num_tokens = row.rollout, len(row.rollout.answer_ids)
    label = "answer" if step.decode else "answer, as token ids"
    if num_tokens > NUM_COLOURED:
        label += f"; its first {NUM_COLOURED:,} of {num_tokens:,} tokens are coloured"
    written = tag(
        "div",
        *(_turn(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in row.problem.messages),
        tag("p", label, class_="role"),
        heat_map(row, step.scale, step.decode),
        tag("p", "feedback", class_="role") if rollout.feedback else None,
        tag("pre", shortened(rollout.feedback)) if rollout.feedback else None,
        _read_by_teacher(row, step),
    )
    sources = row.view.sources if row.view else ()
    peers = tag("div", *(_peer(key, step) for key in sources)) if sources else None
    return tag("article", _chips(row, step), tag("div", written, peers, class_="beside") if peers else written)


def _peer(key: Key, step: _Step) -> Html:
    """Another answer to the problem that stood in what the teacher read."""
    peer = step.rows.get(key)
    if peer is None:
        return tag("p", f"shown to the teacher: answer {key[1]}, which was not saved", class_="role")
    reward = peer.rollout.reward
    words = f"shown to the teacher: answer {key[1]}" + ("" if reward is None else f", reward {compact(reward)}")
    return tag("div", tag("p", words, class_="role"), tag("pre", step.text(peer.rollout.answer_ids), class_="peer"))


def _read_by_teacher(row: Example, step: _Step) -> Html | None:
    """All that the teacher read before the answer, where that is not what the student read."""
    if row.view is None or row.view.context_ids == row.rollout.prompt_ids:
        return None
    cut = f", {row.view.num_truncated_tokens:,} cut to fit" if row.view.num_truncated_tokens else ""
    words = f"What the teacher read before it ({len(row.view.context_ids):,} tokens{cut})"
    return tag("details", tag("summary", words), tag("pre", step.text(row.view.context_ids)))


def _turn(role: str, content: str) -> Html:
    return tag("div", tag("p", role, class_="role"), tag("pre", shortened(content)))


def _chips(row: Example, step: _Step) -> Html:
    rollout = row.rollout
    facts: list[tuple[str, str | None, str | None]] = [
        ("reward", _reward_in_words(rollout), _tone(rollout.reward)),
        ("read as", None if rollout.parsed is None else shortened(rollout.parsed), None),
        ("gold", None if row.problem.gold is None else shortened(row.problem.gold), None),
        ("tokens", f"{len(rollout.answer_ids):,}", None),
        ("cut at the length limit", "" if rollout.finish == "length" else None, "bad"),
        ("problem", row.problem.id, None),
        ("taught nothing: the loss did not read it", "" if step.left_out(row) else None, "bad"),
    ]
    chips = [
        tag("span", f"{name} " if value else name, tag("bdi", value) if value else None, class_=tone)
        for name, value, tone in facts
        if value is not None
    ]
    return tag("div", *chips, class_="chips")


def _reward_in_words(rollout: Rollout) -> str | None:
    """None: the data set's own answer, of which nobody asked."""
    if rollout.reward is None:
        return None if rollout.answer_logprobs is None else "unknown"
    return compact(rollout.reward)


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
