"""The Hugging Face hub, asked once and briefly: its libraries ask for a minute when nobody answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

from opdkit.errors import UserError

ANSWERS_WITHIN_S = 10.0
TRUSTED = "Python files that come with {} run on this machine with all your rights; read them first"
_PINNED: dict[str, str] = {}  # `pinned`
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def may_be_on_hub(name: str) -> bool:
    """Whether `name` can be a hub's: `owner/name` or `name`, and no folder here is called as its owner is."""
    owner, slash, _ = name.partition("/")
    return bool(_NAME.fullmatch(name)) and not (slash and Path(owner).is_dir())


@contextmanager
def asked_once(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> Iterator[str | None]:
    """Gives why the hub does not have `name` for us (None: it does). If so, the libraries ask no further inside the
    block, and find only what an earlier download left on this machine.

    Raises UserError for what can be no name on the hub.
    """
    if not may_be_on_hub(name):
        raise UserError(f"there is no such folder {name[:200]!r}, and it is no name on the hub (owner/name)")
    from huggingface_hub import HfApi, constants

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else None
    try:
        if reason is None:
            ask(name, revision=revision, timeout=ANSWERS_WITHIN_S)
    except Exception as error:  # no connection, no such name, no access: the hub's and its client's own kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    with nullcontext() if reason is None else _offline():
        yield reason


@contextmanager
def pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Inside the block models of these names are read at these commits, whatever the hub calls the newest."""
    before = dict(_PINNED)
    _PINNED.update(commits)
    try:
        yield
    finally:
        _PINNED.clear()
        _PINNED.update(before)


def revision_of(name: str) -> dict[str, str]:
    """For `from_pretrained` of a folder or a name: {"revision": commit} where it is pinned."""
    return {"revision": _PINNED[name]} if name in _PINNED and not Path(name).is_dir() else {}


def commit_of(name: str) -> str | None:
    """The commit of a model's newest files: as the hub says or, where it does not answer, as this machine has them.
    None: unknown, or a folder."""
    if Path(name).is_dir() or not may_be_on_hub(name):
        return None
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if not constants.is_offline_mode():
        # No connection, no access: loading will say it; an earlier download may still serve.
        with suppress(Exception):
            return HfApi().model_info(name, timeout=ANSWERS_WITHIN_S).sha
    kept = try_to_load_from_cache(name, "config.json")
    return Path(kept).parent.name if isinstance(kept, str) else None


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, for a block: the libraries read the variable when they are imported."""
    modules = [module for name in ("huggingface_hub.constants", "datasets.config") if (module := sys.modules.get(name))]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
