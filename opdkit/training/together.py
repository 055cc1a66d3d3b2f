"""How several ranks begin a run: alike, and in one folder."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

from opdkit.data.readers import Dataset
from opdkit.engines.load import model_digest
from opdkit.errors import UserError
from opdkit.ranks.base import Ranks
from opdkit.ranks.join import check_alike, code_digest
from opdkit.recipe import Recipe
from opdkit.recipe.build import flat
from opdkit.recipe.check import check_copies, check_num_ranks
from opdkit.run.folder import RunFolder


def check_ranks(ranks: Ranks, recipe: Recipe, data: Mapping[str, Dataset]) -> None:
    """Raises UserError for more ranks than a step has rows, and where they are not alike."""
    if ranks.size > 1:
        check_num_ranks(recipe, ranks.size)
    check_same(ranks, recipe, data)


def check_same(ranks: Ranks, recipe: Recipe, data: Mapping[str, Dataset]) -> None:
    """Raises UserError where they are not alike."""
    if ranks.size == 1:
        return
    check_copies(recipe, ranks.size)
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "numpy")]
    facts = {f"{name} data": one.fingerprint for name, one in data.items()}
    facts |= {f"{key} files": str(model_digest(Path(path))) for key, path in recipe.model_paths.items()}
    facts |= {"recipe": repr(sorted(flat(recipe.as_dict()).items())), "code": code_digest()}
    facts |= {f"code of {name}": digest for name, digest in recipe.user_files.items()}
    check_alike(ranks, {**facts, "versions": ", ".join([f"Python {platform.python_version()}", *versions])})


@contextmanager
def locked_by_first(ranks: Ranks, path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """`RunFolder.locked`, by the first rank for all. Raises UserError also where another rank does not see it."""
    with ExitStack() as held:

        def lock() -> str:
            held.enter_context(RunFolder.locked(path, resume=resume, overwrite=overwrite))
            return (path / ".lock").read_text()

        told = ranks.from_first(lock)
        blind = [rank for rank, sees in enumerate(ranks.gather(_sees(path, told))) if not sees]
        if blind:
            raise UserError(
                f"rank {blind[0]} does not see the run folder {path} that rank 0 writes; put runs_dir on a file system "
                "that all ranks share"
            )
        yield RunFolder(path)


def _sees(path: Path, told: str) -> bool:
    try:
        return (path / ".lock").read_text() == told
    except OSError:
        return False
