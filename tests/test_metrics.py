"""metrics.jsonl is always complete and valid; other sinks may fail without hurting it."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opdkit import metrics
from opdkit.errors import UserError
from opdkit.metric_lines import of_steps, read_metrics, went_back
from opdkit.metrics import Metric, MetricsLog, SinkStart, reduce_metrics


class Recorder:
    """A sink that remembers, and fails at chosen steps."""

    def __init__(self, start: SinkStart, fails_at: tuple[int, ...] = (), text: str = "boom") -> None:
        self.start, self.fails_at, self.text = start, fails_at, text
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step in self.fails_at:
            raise RuntimeError(self.text)
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_reductions() -> None:
    """Each way several values of one step become one, by hand; None is left out, not taken for 0."""
    parts = {"mean": 2.5, "sum": 5.0, "max": 4.0, "min": 1.0, "last": 1.0}
    for how, expected in parts.items():
        values = [Metric("a/b", 4.0, how), Metric("a/b", None, how), Metric("a/b", 1.0, how)]  # type: ignore[arg-type]
        assert reduce_metrics(values) == {"a/b": expected}
    assert reduce_metrics([Metric("a/b", None)]) == {"a/b": None}
    assert math.isnan(reduce_metrics([Metric("a/b", 1.0, "max"), Metric("a/b", math.nan, "max")])["a/b"] or 0.0)


def test_bad_metrics_are_our_bugs() -> None:
    """A name without an area, and one name reduced in two ways."""
    with pytest.raises(ValueError, match="area/quantity"):
        Metric("loss", 1.0)
    with pytest.raises(ValueError, match="as mean and as sum"):
        reduce_metrics([Metric("a/b", 1.0), Metric("a/b", 1.0, "sum")])


def test_one_valid_line_a_step(tmp_path: Path) -> None:
    """Every write is on disk when it returns; NaN and infinity become null and are counted; None is null and is not."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(0, [Metric("loss/total", 2.0), Metric("loss/total", 1.0)])
        assert lines(path)[0]["loss/total"] == 1.5
        log.write(3, [Metric("a/x", math.nan), Metric("a/y", -math.inf), Metric("a/z", None), Metric("a/w", 1)])
        with pytest.raises(ValueError, match="step 3 after those of step 3"):
            log.write(3, [])
    last = read_metrics(path)[-1]
    assert last["step"] == 3 and last["a/w"] == 1.0
    assert last["a/x"] is None and last["a/y"] is None and last["a/z"] is None
    assert last["metrics/num_non_finite"] == 2 and last["metrics/num_sink_failures"] == 0


@pytest.mark.parametrize("tail", [b"", b'{"step": 9, "lo', b"\x00\x00\x00"])
def test_resume_cuts_later_steps_and_a_torn_line(tmp_path: Path, tail: bytes) -> None:
    """After a resume at step 2 the file holds steps 0-2 byte for byte, then the new ones; a torn last line is gone."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(5):
            log.write(step, [Metric("a/b", step)])
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + tail)
    with MetricsLog(path, resume_at=2) as log:
        assert path.read_bytes() == b"".join(before[:3])
        with pytest.raises(ValueError, match="after those of step 2"):
            log.write(2, [])
        log.write(3, [Metric("a/b", 30)])
    assert [(line["step"], line["a/b"]) for line in lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_an_evaluation_has_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its step's line and for every sink; a resumed run writes it only where the cut file lacks it."""
    sinks: list[Recorder] = []
    monkeypatch.setitem(metrics.SINKS, "wandb", lambda start: sinks.append(Recorder(start)) or sinks[-1])
    path = tmp_path / "metrics.jsonl"
    score = [Metric("eval/d/avg_at_n", 0.5), Metric("eval/d/avg_at_n_low", None)]
    with MetricsLog(path, sinks=["wandb"], project="mine") as log:
        log.write_evaluation(0, score)
        log.write_evaluation(0, [Metric("eval_teacher/d/avg_at_n", 1.0)])
        for step in (1, 2):
            log.write(step, [Metric("a/b", step)])
        log.write_evaluation(2, score)
        log.write(3, [])
        log.write_evaluation(3, score)
        with pytest.raises(ValueError, match="eval/"):
            log.write_evaluation(3, [Metric("a/b", 1.0)])
    assert [line["step"] for line in lines(path)] == [0, 0, 1, 2, 2, 3, 3]
    assert [line["step"] for line in of_steps(read_metrics(path))] == [1, 2, 3]
    assert lines(path)[4].keys() == {"step", "time", "eval/d/avg_at_n", "eval/d/avg_at_n_low"}
    assert sinks[0].start.project == "mine" and (2, {"eval/d/avg_at_n": 0.5}) in sinks[0].seen
    before = path.read_bytes().splitlines(keepends=True)
    with MetricsLog(path, resume_at=2) as log:
        for step, found in ((0, score), (0, [Metric("eval_teacher/d/avg_at_n", 1.0)]), (2, score)):
            log.write_evaluation(step, found)
        assert path.read_bytes() == b"".join(before[:5])
    path.write_bytes(b"".join(before[2:4]))  # stopped in the evaluation of step 2; those of step 0 were never here
    with MetricsLog(path, resume_at=2) as log:
        log.write_evaluation(0, score)
        log.write_evaluation(2, score)
    assert [line["step"] for line in lines(path)] == [1, 2, 2]


def test_steps_that_are_taken_again_replace_those_before(tmp_path: Path) -> None:
    """A run goes back from step 4 to 2 and again from 3 to 1: every line stays, and readers have each step once. A
    killed run goes on within its try."""
    path, score = tmp_path / "metrics.jsonl", [Metric("eval/d/avg_at_n", 0.5)]

    def write(steps: range, attempt: int, evaluated: int | None = None) -> None:
        with MetricsLog(path, resume_at=steps.start - 1, attempt=attempt) as log:
            for step in steps:
                log.write(step, [Metric("a/b", 10 * attempt + step)])
                if step == evaluated:
                    log.write_evaluation(step, score)

    write(range(1, 5), 1, evaluated=4)
    write(range(3, 4), 2)
    assert went_back(lines(path)) == [(2, 4, 2, ())]
    write(range(2, 6), 3, evaluated=4)
    write(range(4, 5), 3)  # killed behind step 3, whose checkpoint was the last
    found = read_metrics(path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 4, 3, 2, 3, 4]
    assert [line.get("attempt") for line in found] == [None] * 5 + [2, 3, 3, 3]
    assert [(line["step"], line["a/b"]) for line in of_steps(found)] == [(1, 11), (2, 32), (3, 33), (4, 34)]
    assert went_back(found) == [(2, 4, 2, ()), (3, 3, 1, ())]
    write(range(3, 3), 1)  # killed before the first checkpoint of the second try: that of the first is the newest
    assert [(line["step"], line["a/b"]) for line in read_metrics(path)] == [(1, 11), (2, 12)]


def test_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    """A run killed before its first line resumes."""
    with MetricsLog(tmp_path / "metrics.jsonl", resume_at=0) as log:
        log.write(1, [])
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_files_that_are_refused(tmp_path: Path) -> None:
    """A broken line in the middle, and a folder that does not exist."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\nnot json\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"cannot open .*No such file"):
        MetricsLog(tmp_path / "no" / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a metrics line"):
        MetricsLog(path, resume_at=1)
    assert path.read_bytes().count(b"\n") == 3, "a refusal changes nothing"


def test_full_disk_is_said(tmp_path: Path) -> None:
    """/dev/full answers every write with "no space left": one sentence, and closing does not raise again."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write step 0 .*No space left.*--resume"), log:
        log.write(0, [])


def test_a_failing_sink_is_said_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on, later steps reach the sink again, the count is in metrics.jsonl, secrets are not in the log."""
    made: list[Recorder] = []

    def start(sink_start: SinkStart) -> Recorder:
        made.append(Recorder(sink_start, fails_at=(1, 2), text="refused key abcdef123456"))
        return made[-1]

    monkeypatch.setitem(metrics.SINKS, "wandb", start)
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "metrics.jsonl", sinks=["wandb"]) as log:
        for step in range(4):
            log.write(step, [Metric("a/b", step), Metric("a/nan", math.nan)])
    assert len(caplog.records) == 1 and "wandb failed" in caplog.text and "(hidden)" in caplog.text
    assert "abcdef123456" not in caplog.text
    assert [line["metrics/num_sink_failures"] for line in lines(log.path)] == [0, 1, 2, 2]
    assert log.sink_failures == {"wandb": 2}
    assert [step for step, _ in made[0].seen] == [0, 3] and made[0].closed == 1
    assert all("a/nan" not in values for _, values in made[0].seen), "sinks get finite values only"


def test_config_secrets_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of keys like api_key are hidden at any depth; `max_answer_tokens` and `tokens` are not secrets."""
    made: list[Recorder] = []
    monkeypatch.setitem(metrics.SINKS, "wandb", lambda start: made.append(Recorder(start)) or made[-1])
    config = {"server": [{"api_key": "sk-1", "url": "u"}], "max_answer_tokens": 5, "weights": {"tokens": "soft_or"}}
    MetricsLog(tmp_path / "metrics.jsonl", sinks=["wandb"], config=config).close()
    expected = {"server": [{"api_key": "(hidden)", "url": "u"}], "max_answer_tokens": 5}
    assert made[0].start.config == {**expected, "weights": {"tokens": "soft_or"}}


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    """A sink that is not installed is refused before the first step, with the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'opdkit\[{name}\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", sinks=[name])


def test_sinks_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name gets a suggestion; a start that fails closes the sinks that had started."""
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        MetricsLog(tmp_path / "a.jsonl", sinks=["tensorbord"])
    made: list[Recorder] = []
    monkeypatch.setitem(metrics.SINKS, "wandb", lambda start: made.append(Recorder(start)) or made[-1])

    def broken(start: SinkStart) -> Recorder:
        raise RuntimeError("no network")

    monkeypatch.setitem(metrics.SINKS, "trackio", broken)
    with pytest.raises(UserError, match=r"trackio could not start .*no network"):
        MetricsLog(tmp_path / "b.jsonl", sinks=["wandb", "trackio"])
    assert made[0].closed == 1


@pytest.mark.parametrize("resume_at", [0, 1])
def test_tensorboard_holds_the_curve(tmp_path: Path, resume_at: int) -> None:
    """The event files read back as the values written; after a resume the steps that were cut are gone there too.

    W&B (offline) and Trackio are not installed for the tests; both were run by hand.
    """
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, sinks=["tensorboard"]) as log:
        for step in range(1, 4):
            log.write(step, [Metric("a/b", step)])
    with MetricsLog(path, sinks=["tensorboard"], resume_at=resume_at) as log:
        log.write(resume_at + 1, [Metric("a/b", 20)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    kept = [(step, step) for step in range(1, resume_at + 1)]
    assert [(event.step, event.value) for event in events.Scalars("a/b")] == [*kept, (resume_at + 1, 20)]
