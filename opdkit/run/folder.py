"""The run folder: what a run leaves behind, where, and how it is written so that a crash never leaves half a file.

    recipe.toml        resolved, complete              environment.json   versions, hardware, commit, data fingerprints
    metrics.jsonl      one line a step (metrics.py)    rows/step_000012.parquet   every Example of the step (rows.py)
    spool/             what teachers said, if asked    eval/step_000100.json
    checkpoints/step_000100/
    summary.json       before / after / teacher        report.html
    sums.txt           checksums of these (sums.py)

It is a public contract: other tools read it. Every file but metrics.jsonl appears whole or not at all (temporary file,
fsync, rename). One process writes a run at a time (`.lock`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from opdkit import toml
from opdkit.data.files.write import SHOWN, file_to_write, what_is_at
from opdkit.errors import UserError
from opdkit.run import sums
from opdkit.run.environment import changes, describe_environment
from opdkit.run.lock import NAME_BYTES, Lock, is_unfinished

_FILES = (sums.SUMS, "environment.json", "metrics.jsonl", "summary.json", "report.html", "wandb_id", "vllm.log")
_FOLDERS = ("rows", "spool", "checkpoints", "eval", "sampler", "tensorboard", "wandb")
_CODE = ("task ", "method ", "context ", "weight ")  # fingerprints of a user's own files, by what they are
_OURS = {"recipe.toml", ".lock", "ranks", *_FILES, *_FOLDERS}
# What readers of a recipe.toml take for granted.
_RECIPE_HAS = {
    "model": ("path", "dtype"),
    "teacher": ("kind",),
    "context": ("kind",),
    "data": ("train", "task"),
    "sampling": ("temperature", "top_p", "top_k", "min_p", "max_answer_tokens"),
    "method": ("name", "loss_temperature"),
    "train": ("steps",),
}


class RunFolder:
    """The paths of a run, and readers and writers for its small files. Making one touches nothing on disk.

    `RunFolder.open` to write a run, `RunFolder(path)` to read one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.spool = self.path / "spool"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self._lock: Lock | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> Self:
        """Create the folder, or go on in the one that is there (resume), or empty it first (overwrite). It is locked
        until `close`. A context manager.

        Raises UserError: the run exists (and neither was asked), does not exist (resume), or is being written by a
        living process; the folder is something else than a run. `overwrite` deletes only what a run wrote, and only
        beside a recipe.toml.
        """
        run = cls.locked(path, resume=resume, overwrite=overwrite)
        try:
            run.prepare(overwrite=overwrite)
        except UserError:
            run.close()
            raise
        return run

    @classmethod
    def locked(cls, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> Self:
        """The refusals of `open`, and the lock; what is there is as it was. A folder made for it goes at `close`."""
        run = cls.check(path, resume=resume, overwrite=overwrite)
        run._lock = Lock.on_folder(run.path)
        try:
            run._check_existing(resume=resume, overwrite=overwrite)  # another process may have come and gone
        except UserError:
            run.close()
            raise
        return run

    @classmethod
    def check(cls, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> Self:
        """The refusals of `open`, but for the lock, without touching anything."""
        if resume and overwrite:
            raise UserError("--resume goes on with the run and --overwrite deletes it: choose one")
        run = cls(path)
        run._check_existing(resume=resume, overwrite=overwrite)
        return run

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder ready to be written, emptied first with `overwrite`. It must be locked."""
        try:
            if overwrite:
                self._delete_run()
            for name in ("rows", "checkpoints", "eval"):
                (self.path / name).mkdir(exist_ok=True)
            self._delete_unfinished()
        except OSError as error:
            raise UserError(f"cannot prepare the run folder {self.path}: {error}") from error

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, step: int) -> Path:
        return self.path / "rows" / f"step_{step:06d}.parquet"

    def row_steps(self) -> list[int]:
        """The steps whose rows were saved."""
        names = [path.stem.removeprefix("step_") for path in (self.path / "rows").glob("step_*.parquet")]
        return sorted(int(name) for name in names if name.isdigit())

    def evaluation(self, of: int | str) -> Path:
        """of: the step of the student, or a name ("teacher")."""
        return self.path / "eval" / (f"step_{of:06d}.json" if isinstance(of, int) else f"{of}.json")

    def discard_after(self, step: int) -> None:
        """Remove rows, spools and evaluations of later steps than the one a run goes on from: they are made again."""
        for folder in ("rows", "spool", "eval"):
            for path in (self.path / folder).glob("step_*"):
                # Behind the number more may follow: of one that was begun, or a rank's own.
                found = re.match(r"step_(\d+)[.-]", path.name)
                if found and int(found[1]) > step:
                    path.unlink()

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """recipe: nested dicts of str, int, float, bool, lists and dicts; None is not TOML, leave such keys out."""
        if not self.recipe.exists():
            sums.begin(self.path)
        atomic_write(self.recipe, toml.dumps(recipe))

    def read_recipe(self) -> dict[str, Any]:
        text = self._read(self.recipe)
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(self.recipe, error) from None

    def clock(self, *, anew: bool = False) -> datetime:
        """What the date is to chat templates that print it: the day the run began, whenever it is resumed.

        anew: the run that is there will be replaced.
        """
        began = {} if anew or not self.environment.exists() else self.read_environment()
        if "clock" in began:
            return datetime.fromisoformat(began["clock"])
        if "time" in began:  # by opdkit 0.1: when it was first written, in UTC
            return datetime.fromisoformat(began["time"]).astimezone().replace(tzinfo=None)
        return datetime.now().replace(microsecond=0)

    def read_whole_recipe(self) -> dict[str, Any]:
        """The same. Raises UserError unless it has what every recipe has that a run resolved."""
        found = self.read_recipe()
        for section, keys in _RECIPE_HAS.items():
            if not isinstance(found.get(section), dict) or not {*keys} <= found[section].keys():
                raise _damaged(self.recipe, f"it lacks {section}.{keys[0]}")
        return found

    def write_environment(
        self,
        fingerprints: Mapping[str, str],
        *,
        task: Mapping[str, Any] | None = None,
        clock: datetime | None = None,
        models: Mapping[str, str | None] | None = None,
        commits: Mapping[str, str] | None = None,
        changed: Mapping[str, Any] | None = None,
        devices: Sequence[str] = (),
        ranks: int = 1,
    ) -> list[str]:
        """What the run runs on (`environment.py`), which data it reads (source -> `Dataset.fingerprint`), who grades,
        and the digests of its models (recipe key -> digest; None: a hub's, which `commits` has by its
        name). clock: what its prompts say the date is, where a chat template prints it; ranks: how many processes.

        A resumed run keeps the first record and appends what it resumes on, and the recipe keys that were `changed`;
        returns in what its libraries and its machine are not those of the call before, a sentence each. Raises
        UserError when the data changed.
        """
        now = describe_environment(devices) | ({} if task is None else {"task": task})
        now |= {"ranks": ranks} if ranks > 1 else {}
        if not self.environment.exists():
            now |= {} if clock is None else {"clock": clock.isoformat()}
            content = {**now, "data": dict(fingerprints), "models": dict(models or {}), "resumed": []}
            content |= {"commits": dict(commits)} if commits else {}
            write_json(self.environment, content)
            return []
        first = self.read_environment()
        for source, fingerprint in fingerprints.items():
            if first["data"].get(source, fingerprint) != fingerprint:
                why = "its code" if source.startswith(_CODE) else "its problems, its instruction or the seed"
                raise UserError(
                    f"{source} is not what it was when {self.path} began ({why} changed), so the run cannot go on with "
                    "it: restore it, or start another run"
                )
        said = changes([first, *first["resumed"]][-1], now)
        resumed = [*first["resumed"], now | ({"changed": dict(changed)} if changed else {})]
        data = {**first["data"], **fingerprints}
        known = {**(models or {}), **first.get("models", {})}
        content = {**first, "data": data, "models": known, "resumed": resumed}
        content |= {"commits": {**(commits or {}), **first.get("commits", {})}} if commits else {}
        write_json(self.environment, content)
        return said

    def read_environment(self) -> dict[str, Any]:
        """Raises UserError for a file that is not one of `write_environment`."""
        found = self._read_object(self.environment)
        parts = {"data": dict, "resumed": list, "models": dict, "commits": dict}
        if not all(isinstance(found.get(key, kind()), kind) for key, kind in parts.items()) or "data" not in found:
            raise _damaged(self.environment, "it has no data and resumed")
        return {"resumed": [], **found}

    def write_evaluation(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """path: of `evaluation(...)`. Content: E of design section 8, {"<dataset>": `measure.accuracy.Accuracy`}."""
        write_json(path, evaluation)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any]:
        return self._read_object(self.summary)

    def read_evaluation(self, path: Path) -> dict[str, Any]:
        return self._read_object(path)

    def _read_object(self, path: Path) -> dict[str, Any]:
        self._read(path)  # which says why it is not there
        return read_object(path)

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            why = "the run has not written it" if self.recipe.exists() else f"{self.path} is not a run folder"
            raise UserError(f"there is no {path}: {why}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from None

    def _check_existing(self, *, resume: bool, overwrite: bool) -> None:
        try:
            self._check_what_is_there(resume=resume, overwrite=overwrite)
        except OSError as error:  # too long a name, a folder that cannot be read
            raise UserError(f"{str(self.path)[:SHOWN]} cannot be a run folder: {error.strerror}") from None

    def _check_what_is_there(self, *, resume: bool, overwrite: bool) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is {what_is_at(self.path)}, not a folder: give the run another name")
        if self.recipe.exists():
            if not resume and not overwrite and self.has_begun:
                raise UserError(
                    f"a run already exists at {self.path}: continue it with --resume, replace it with --overwrite, "
                    "or give this one another name"
                )
            return
        if resume:
            raise UserError(f"nothing to resume at {self.path}: it has no recipe.toml; start without --resume")
        entries = self.path.iterdir() if self.path.exists() else ()
        foreign = sorted(entry.name for entry in entries if entry.name not in _OURS and not is_unfinished(entry))
        if foreign:
            names = ", ".join(foreign[:3])
            raise UserError(f"{self.path} is a folder of something else (it holds {names}): give the run another name")

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to lose. A run that was refused before its first number is no run."""
        begun = self.metrics.exists() and self.metrics.stat().st_size > 0
        kept = any(any((self.path / name).glob("*")) for name in ("checkpoints", "eval"))
        return self.recipe.exists() and (begun or kept)

    def _delete_run(self) -> None:
        """Only what a run writes; recipe.toml last, so that a half-deleted run is still known as one."""
        for name in _FOLDERS:
            entry = self.path / name
            if entry.is_symlink():
                raise UserError(
                    f"{entry} is a link, and --overwrite does not delete what links lead to: remove it by hand"
                )
            if entry.exists():
                shutil.rmtree(entry)
        for name in (*_FILES, "recipe.toml"):
            (self.path / name).unlink(missing_ok=True)

    def _delete_unfinished(self) -> None:
        """Temporary files of a process that was killed while writing. We hold the lock, so nobody is using them."""
        for folder in (self.path, self.path / "rows", self.path / "eval", self.spool):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if is_unfinished(entry) and entry.is_file():
                    entry.unlink()
        for begun in (self.path / "eval").glob("*.begun"):  # its answers are in the evaluation, once that is there
            if begun.with_name(f"{begun.name.partition('.')[0]}.json").exists():
                begun.unlink()


def teacher_reading_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How a saved run's teacher was asked: what its [teacher] does not say was as for the student."""
    model, teacher = recipe.get("model", {}), recipe.get("teacher", {})
    defaults = {"template_kwargs": {}, "close_thinking": False, "system": None}
    return {key: teacher.get(key, model.get(key, default)) for key, default in defaults.items()}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write to the path `with` gives: when the block ends well it becomes `path`, whole and on disk, else it is gone.

    A link stays one: what it leads to is replaced. A full disk becomes a UserError that names the file and says what is
    safe, and so does a path that cannot be a file.
    """
    path = file_to_write(path)
    unfinished = path.with_name(f".{path.name[:NAME_BYTES]}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        sums.note(path, unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full: {path} was not written ({os.strerror(error.errno)}); everything saved before it is "
            "safe and unchanged: free some space and run again with --resume"
        ) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """The whole file or no change. Raises UserError when the disk is full."""
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for a file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it is no JSON object")
    return found


def _damaged(path: Path, why: Exception | str) -> UserError:
    reason = " ".join(str(why).split()) or type(why).__name__
    return UserError(f"{path} is damaged or something else's ({reason}): restore it from a copy, or start another run")
