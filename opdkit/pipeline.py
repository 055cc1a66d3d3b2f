"""`opdkit pipeline`: the stages of a pipeline one after the other, each from what an earlier one made; resumable.

    runs/<name>/pipeline.json      what every stage was defined as when it began, and what came of it
    runs/<name>/<stage>/           train: a run folder; sample: answers.jsonl; make_model, export: model/; evaluate:
                                   result.json

A stage is finished when pipeline.json says so; then it is skipped, once its result is found as it was left. A stage
that was begun goes on where it stopped. Either is refused if its definition is another one now.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit import toml
from opdkit.engines.load import model_digest
from opdkit.errors import PAUSED, Interrupted, Paused, UserError
from opdkit.evaluation.evaluate import evaluate_model
from opdkit.evaluation.options import EvaluateOptions
from opdkit.evaluation.sample import SampleOptions, rules_of, sample
from opdkit.launch import STOPPED, launch_training
from opdkit.measure.accuracy import Accuracy
from opdkit.recipe import Recipe
from opdkit.recipe.build import flat
from opdkit.recipe.check import check_num_ranks
from opdkit.recipe.pipeline import Pipeline, Stage
from opdkit.recipe.stage_kinds import Asked, Evaluate, Export, MakeModel, Sample
from opdkit.reporting import write_report
from opdkit.run.console import Console, Line, Table, say
from opdkit.run.folder import RunFolder, atomic_write
from opdkit.run.lock import Lock, is_unfinished
from opdkit.training.loop import train
from opdkit.training.make_model import make_model
from opdkit.training.saved.export import export
from opdkit.training.saved.resume import CHANGEABLE

RECORD = "pipeline.json"


def run_pipeline(pipeline: Pipeline, *, console: Console, redo: str | None = None, ranks: int = 1) -> dict[str, Any]:
    """Run what is not finished; returns the record, as in pipeline.json.

    redo: a stage to make again, with all that follow it; what they made is deleted. ranks: processes of every stage
    that trains. Raises UserError for what cannot
    work (before anything runs, as far as it can be known without weights), Interrupted after Ctrl-C.
    """
    pipeline.check_installed()
    record = Record(pipeline)
    again = record.from_(redo) if redo is not None else []
    to_come = {stage.name for stage in pipeline.stages if stage in again or not record.is_finished(stage)}
    if missing := [sentence for name, sentence in pipeline.missing() if name in to_come]:
        raise UserError(*(f"{pipeline.file}: {sentence}" for sentence in missing))
    for stage in pipeline.stages if ranks > 1 else ():
        if stage.name in to_come and isinstance(stage.does, Recipe):
            check_num_ranks(stage.does, ranks)
    lock = Lock.on_folder(pipeline.folder)
    try:
        record.read()  # again: another process may have come and gone
        record.forget(again)
        record.check()
        say(console, _table_before(record))
        for number, stage in enumerate(pipeline.stages, start=1):
            if not record.is_finished(stage):
                say(console, "", Line((f"{number}/{len(pipeline.stages)}  {stage.name}", "bold")))
                _run(stage, record, console, ranks)
        say(console, "", _table_after(record))
        for stage in pipeline.stages:
            say(console, f"{stage.name}: {stage.result}")
    except (Interrupted, KeyboardInterrupt):
        again_as = "the same command" if redo is None else "the same command without --redo"
        raise Interrupted(f"Everything so far is kept; run {again_as} to go on.") from None
    finally:
        lock.release()
    return record.content


class Record:
    """pipeline.json: {"name", "stages": {name: {"kind", "definition", "seconds", "result", "digest", "numbers"}}}.

    The last three are there once the stage is finished.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.path = pipeline.folder / RECORD
        self.read()

    def read(self) -> None:
        self.content: dict[str, Any] = {"name": self.pipeline.name, "stages": {}}
        if self.path.exists():
            self.content = _read_record(self.path)
        elif self.pipeline.folder.is_dir() and any(
            entry.name != ".lock" and not is_unfinished(entry) for entry in self.pipeline.folder.iterdir()
        ):
            raise UserError(
                f"{self.pipeline.folder} is a folder of something else (it has no {RECORD}): give the pipeline another "
                "name, or remove it"
            )
        elif self.pipeline.folder.exists() and not self.pipeline.folder.is_dir():
            raise UserError(f"{self.pipeline.folder} is a file, not a folder: give the pipeline another name")

    def entry(self, stage: Stage) -> dict[str, Any] | None:
        return self.content["stages"].get(stage.name)

    def is_finished(self, stage: Stage) -> bool:
        entry = self.entry(stage)
        return entry is not None and "result" in entry

    def check(self) -> None:
        """Raises UserError for a stage that is defined otherwise than when it began, or whose result was changed."""
        faults = []
        for stage in self.pipeline.stages:
            entry = self.entry(stage)
            way_out = f"undo that, or make the stage and all after it again with --redo {stage.name}"
            if entry is None:
                continue
            if differ := _differences(entry, stage):
                faults.append(f"stage {stage.name} has begun as something else: {'; '.join(differ)}; {way_out}")
            elif "result" in entry and digest(stage) != entry["digest"]:
                what = "was changed" if stage.result.exists() else "is gone"
                faults.append(f"stage {stage.name} is finished, but its result {stage.result} {what}; {way_out}")
        if faults:
            raise UserError(*(f"{self.pipeline.file}: {fault}" for fault in faults))

    def from_(self, name: str) -> list[Stage]:
        """The stage of this name and all later ones. Raises UserError."""
        names = [stage.name for stage in self.pipeline.stages]
        if name not in names:
            raise UserError(f"--redo {name}: {self.pipeline.file} has no such stage; it has {', '.join(names)}")
        return list(self.pipeline.stages[names.index(name) :])

    def forget(self, stages: Sequence[Stage]) -> None:
        """Delete what they made."""
        for stage in stages:
            if stage.folder.is_symlink():
                raise UserError(f"{stage.folder} is a link, and --redo does not delete what links lead to")
            if self.content["stages"].pop(stage.name, None) is not None:
                self._write()
                shutil.rmtree(stage.folder, ignore_errors=True)

    def begin(self, stage: Stage) -> None:
        if self.entry(stage) is None:
            self.content["stages"][stage.name] = {
                "kind": stage.kind,
                "definition": stage.as_dict(),
                "seconds": 0.0,
            }
            self._write()

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        self.content["stages"][stage.name]["seconds"] += round(seconds, 3)
        self._write()

    def finish(self, stage: Stage, numbers: Mapping[str, Any]) -> None:
        self.content["stages"][stage.name] |= {
            "result": str(stage.result),
            "digest": digest(stage),
            "numbers": dict(numbers),
        }
        self._write()

    def _write(self) -> None:
        atomic_write(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def _read_record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(entry["definition"], dict) for entry in content["stages"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} is no whole record of a pipeline: put back what it was, or give the pipeline another name"
        )
    return content


def digest(stage: Stage) -> str | None:
    """Of a finished stage's result, so that later stages are known to stand on what they stood on; None: it is gone."""
    if not stage.result.exists():
        return None
    if stage.result.is_dir():
        return model_digest(stage.result)
    return hashlib.sha256(stage.result.read_bytes()).hexdigest()


def _run(stage: Stage, record: Record, console: Console, ranks: int) -> None:
    record.begin(stage)
    started = time.monotonic()
    try:
        match stage.does:
            case Recipe():
                numbers = _train(stage, stage.does, console, ranks)
            case Sample():
                numbers = _sample(stage, stage.does, console)
            case Evaluate():
                numbers = {"eval": evaluate_model(_options(stage.does), out=stage.folder, console=console)}
            case MakeModel():
                numbers = _make_model(stage, stage.does, console)
            case Export():
                numbers = _export(stage, stage.does, console)
    finally:
        record.add_seconds(stage, time.monotonic() - started)
    record.finish(stage, numbers)


def _train(stage: Stage, recipe: Recipe, console: Console, ranks: int) -> dict[str, Any]:
    if ranks > 1:
        summary = _train_on_ranks(stage, recipe, console, ranks)
    else:
        summary = train(recipe, console=console, resume=(recipe.run_dir / "recipe.toml").exists())
        say(console, f"report: {write_report(recipe.run_dir)}")
    if ended := summary.get("ended"):
        raise UserError(
            f"stage {stage.name} ended after step {ended['step']}, so nothing is made of it: {ended['why']}; mend "
            f"that, or set {stage.name}.sentinels.action=warn, and run the same command again"
        )
    assert recipe.run_dir / summary["model"] == stage.result
    return {key: summary[key] for key in ("method", "steps", "tokens", "eval")}


def _train_on_ranks(stage: Stage, recipe: Recipe, console: Console, ranks: int) -> dict[str, Any]:
    """The ranks read the stage's recipe from a file beside its folder."""
    file, folder = stage.folder.parent / f"{stage.name}.toml", RunFolder(recipe.run_dir)
    atomic_write(file, toml.dumps(recipe.as_dict()))
    command = ["train", str(file), *(["--resume"] if folder.recipe.exists() else [])]
    status = launch_training(command, ranks, recipe, again="the same command", errors=console)
    if status in (PAUSED, STOPPED):
        raise Paused("see above") if status == PAUSED else Interrupted
    if status:
        raise UserError(f"stage {stage.name} has ended: see above")
    return folder.read_summary()


def _sample(stage: Stage, asked: Sample, console: Console) -> dict[str, Any]:
    options = SampleOptions(
        model=_options(asked), reject=rules_of(",".join(asked.reject) or "none"), attempts=asked.attempts
    )
    counts = sample(options, out=stage.result, console=console)
    if not counts["kept"]:
        raise UserError(
            f"stage {stage.name} kept no answer: every one was rejected (reasons in {stage.result}.rejected.jsonl); "
            "loosen its reject, or ask a model that can answer"
        )
    return {"kept": counts["kept"], "missing": counts["missing"]}


def _make_model(stage: Stage, asked: MakeModel, console: Console) -> dict[str, Any]:
    if not stage.result.exists():  # it appears whole or not at all
        shutil.rmtree(stage.folder, ignore_errors=True)  # what a killed process left of its lessons
        make_model(stage.result, **asked.model_dump(), console=console)
    return {}


def _export(stage: Stage, asked: Export, console: Console) -> dict[str, Any]:
    if not stage.result.exists():  # it appears whole, `.complete` in it, or not at all
        options = asked.model_dump(exclude={"run"})
        export(asked.folder, stage.result, **options, console=console)
    return {}


def _options(asked: Asked) -> EvaluateOptions:
    keys = asked.model_dump(exclude={"n", "data", "reject", "attempts"})
    return EvaluateOptions(**keys, data=(asked.data,), num_samples=asked.n)


def _differences(entry: Mapping[str, Any], stage: Stage) -> list[str]:
    was, now = flat(entry["definition"]), flat(json.loads(json.dumps(stage.as_dict())))
    if entry["kind"] != stage.kind:
        return [f"kind was {entry['kind']!r}, is {stage.kind!r}"]
    changeable = set(CHANGEABLE) if stage.kind == "train" else {"device"}
    keys = sorted({*was, *now} - changeable)
    return [f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in keys if was.get(key) != now.get(key)]


def _table_before(record: Record) -> Table:
    table = Table("", "stage", "what it does", "reads", "state", title=record.pipeline.name)
    for number, stage in enumerate(record.pipeline.stages, start=1):
        state = "begun" if record.entry(stage) else "to do"
        if record.is_finished(stage):
            state = "finished"
        table.add_row(str(number), stage.name, _words(stage), ", ".join(stage.reads), state)
    return table


def _words(stage: Stage) -> str:
    match stage.does:
        case Recipe():
            scheduled = ", scheduled" if stage.does.schedule else ""
            return f"train {stage.does.method.name}, {stage.does.train.steps} steps{scheduled}"
        case Sample():
            return f"sample {stage.does.n} of {stage.does.model}, reject {', '.join(stage.does.reject) or 'nothing'}"
        case Evaluate():
            return f"evaluate {stage.does.model} on {stage.does.data}"
        case MakeModel():
            return f"make a model, {stage.does.steps} steps of lessons from {stage.does.data}"
        case Export():
            return f"export step {stage.does.step or 'the last'} in {stage.does.dtype}"


def _table_after(record: Record) -> Table:
    table = Table("stage", "before", "after", "teacher", "seconds", title=record.pipeline.name)
    for column in table.columns:
        column.overflow = "fold"
    for stage in record.pipeline.stages:
        entry = record.entry(stage)
        assert entry is not None
        numbers = entry["numbers"]
        cells = ["", "", ""]
        if isinstance(stage.does, Recipe):
            of = [numbers["eval"][which] for which in ("student_before", "student_after", "teacher")]
            cells = ["\n".join(_accuracy(e) for e in (results or {}).values()) for results in of]
        elif isinstance(stage.does, Evaluate):
            cells[1] = "\n".join(_accuracy(e) for e in numbers["eval"].values())
        elif isinstance(stage.does, Sample):
            cells[1] = f"{numbers['kept']} answers, {numbers['missing']} missing"
        table.add_row(stage.name, *cells, f"{entry['seconds']:.0f}")
    return table


def _accuracy(e: Accuracy) -> str:
    avg = e["avg_at_n"]
    if avg["value"] is None:
        return "unknown"
    return f"{avg['value']:.3f} [{avg['low']:.3f}, {avg['high']:.3f}]"
