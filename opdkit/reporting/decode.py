"""The tokenizer of a run, to read its token ids with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opdkit.errors import UserError
from opdkit.reporting.figures.tokens import Decode
from opdkit.reporting.files import checked
from opdkit.reporting.run import RunContents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 256 << 20  # of a tokenizer.json; the largest known have 35 MB


def tokenizer_decode(run: RunContents) -> Decode | None:
    """The decoder of the run's tokenizer, special tokens included; None if its file is not on this machine.

    Only `tokenizer.json` is read, from the run's own checkpoint, the model's folder or the hub's cache: no network, no
    model code, and no torch.
    """
    from tokenizers import Tokenizer

    for path in _tokenizer_files(run):
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(checked(path, MOST_BYTES)))
            except UserError:
                continue
            except Exception:  # tokenizers raises bare Exception for a damaged file; the next place may hold a good one
                continue
            return _decoder(tokenizer)
    return None


def _decoder(tokenizer: Tokenizer) -> Decode:
    words: dict[int, str] = {}  # single tokens, which are asked for again and again

    def decode(ids: Sequence[int]) -> str:
        if len(ids) != 1:
            return str(tokenizer.decode(list(ids), skip_special_tokens=False))
        if ids[0] not in words:
            words[ids[0]] = str(tokenizer.decode(list(ids), skip_special_tokens=False))
        return words[ids[0]]

    return decode


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
