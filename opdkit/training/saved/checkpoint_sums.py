"""Whether a checkpoint's files are those that were written: SHA256SUMS, in the form of `sha256sum`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

SUMS = "SHA256SUMS"


class Damaged(Exception):
    """Why a checkpoint is not whole."""


def write_sums(folder: Path) -> None:
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        raise Damaged(f"{SUMS} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{SUMS} cannot be read: {error}") from None
    if "state.json" not in sums:
        raise Damaged(f"{SUMS} is cut short")
    for name, digest in sums.items():
        file = folder / name
        try:
            is_same = file.is_file() and _sha256(file) == digest
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if not is_same:
            raise Damaged(f"{name} is not what was written" if file.exists() else f"{name} is missing")


def check_without_sums(folder: Path, files: Sequence[str]) -> None:
    """Of a checkpoint from before there were checksums: whether everything is there and begins as it should."""
    for name in (f"{name}.safetensors" for name in files):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
    if not any((folder / "model").glob("*.safetensors")):
        raise Damaged("model has no weights")
    for file in _files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise Damaged(f"{file.relative_to(folder)} cannot be read: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """Every file below it; SHA256SUMS is written after the others."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
