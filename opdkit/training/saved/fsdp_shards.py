"""Checkpoints of FSDP as verl lays them out, to be exported: a pickle of every rank, its tensors put together again.

    actor/model_world_size_4_rank_0.pt ... _rank_3.pt    {parameter: DTensor, or a tensor that every rank has whole}
    actor/huggingface/                                   config.json, tokenizer, generation_config.json

The pickles are read with `weights_only=True`, which makes tensors and nothing else: a file that asks for more is
refused. So are shards over more than one axis (tensor parallelism), ranks that are missing, and adapters.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opdkit.errors import UserError

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
WORDS = "huggingface"


def shards_of(folder: Path) -> Path | None:
    """The folder with the shards: this one, or its actor/; None: there are none."""
    places = (folder, folder / "actor")
    return next((place for place in places if any(place.glob("model_world_size_*_rank_*.pt"))), None)


def put_together(folder: Path, out: Path) -> None:
    """Write the model that the shards in `folder` are of into `out`, in Hugging Face format and the shards' own types.

    Raises UserError for shards that are not whole, or not of this layout.
    """
    words = folder / WORDS
    if not (words / "config.json").is_file():
        raise UserError(f"{folder} has shards and no {WORDS}/config.json; copy the model's config and tokenizer there")
    tensors = _merged(_files(folder))
    if adapters := [name for name in tensors if "lora_" in name]:
        raise UserError(
            f"{folder} holds the shards of a LoRA model (first: {adapters[0]}), which its trainer also saves as an "
            "adapter; use that folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for file in words.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(file, out / file.name)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")


def _files(folder: Path) -> list[Path]:
    """By rank."""
    found = {(int(m[1]), int(m[2])): path for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))}
    sizes = sorted({size for size, _ in found})
    if len(sizes) != 1:
        raise UserError(f"{folder} holds shards of runs with {' and '.join(map(str, sizes))} ranks; keep those of one")
    if missing := [rank for rank in range(sizes[0]) if (sizes[0], rank) not in found]:
        raise UserError(f"{folder} lacks the shards of {len(missing)} of {sizes[0]} ranks (first: rank {missing[0]})")
    return [found[sizes[0], rank] for rank in range(sizes[0])]


def _merged(files: list[Path]) -> dict[str, Tensor]:
    ranks = [_read(file) for file in files]
    for file, tensors in zip(files, ranks, strict=True):
        if tensors.keys() != ranks[0].keys():
            raise UserError(f"{file} holds other parameters than {files[0].name}; copy the checkpoint again")
    digests = [_digest(tensors) for tensors in ranks]
    if digests[0] is not None and len(set(digests)) < len(files):
        raise UserError(f"two of the files in {files[0].parent} hold the same shards; copy the checkpoint again")
    return {name: _whole(name, [tensors[name] for tensors in ranks], files[0].parent) for name in ranks[0]}


def _digest(tensors: dict[str, Any]) -> str | None:
    """Of what only this rank has, so that a file is known that stands for another; None: it has nothing of its own."""
    from torch.distributed.tensor import DTensor, Shard

    digest, is_own = hashlib.sha256(), False
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, DTensor):
            if not any(isinstance(one, Shard) for one in value.placements) or value.device_mesh.ndim > 1:
                continue  # with copies of each shard, equal files are as they should be
            is_own = True
            head = value.to_local().reshape(-1)[: 1 << 16].contiguous()
            digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if is_own else None


def _read(file: Path) -> dict[str, Any]:
    import torch.distributed.tensor  # with it torch knows the parts of a DTensor as tensors

    try:
        with _without_mesh_warnings():
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError, TypeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{file} is not read: it holds more than tensors, or is not whole ({why})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} is not read: it is no table of tensors by parameter")
    return found


@contextmanager
def _without_mesh_warnings() -> Iterator[None]:
    """Of process groups, which nobody here makes."""
    log = logging.getLogger("torch.distributed.device_mesh")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _whole(name: str, parts: list[Any], folder: Path) -> Tensor:
    """One tensor of what each rank has of it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    first = parts[0]
    if not isinstance(first, DTensor):
        if any(isinstance(part, DTensor) or not torch.equal(part, first) for part in parts):
            raise UserError(f"{folder}: {name} is a whole tensor on each rank, and not the same one on all")
        return first
    if not all(isinstance(part, DTensor) and part.placements == first.placements for part in parts):
        raise UserError(f"{folder}: {name} is not dealt in the same way on all ranks")
    axes = [axis for axis, placement in enumerate(first.placements) if type(placement) is Shard]
    if len(axes) > 1 or not all(type(placement) in (Shard, Replicate) for placement in first.placements):
        raise UserError(
            f"{folder}: {name} is dealt as {first.placements}, and only shards over one axis are read (FSDP, HSDP); "
            "merge the checkpoint with the trainer that wrote it"
        )
    mesh = first.device_mesh.mesh
    if mesh.numel() != len(parts):
        raise UserError(f"{folder}: {name} is dealt to {mesh.numel()} ranks, and there are files of {len(parts)}")
    chosen = mesh[tuple(slice(None) if axis in axes else 0 for axis in range(mesh.ndim))].reshape(-1).tolist()
    local = [parts[rank].to_local() for rank in chosen]
    whole = local[0]
    if axes:
        shard = first.placements[axes[0]]
        assert isinstance(shard, Shard)
        whole = torch.cat(local, dim=shard.dim)
    if whole.shape != first.shape:
        raise UserError(f"{folder}: the shards of {name} come to {list(whole.shape)}, and it is {list(first.shape)}")
    return whole
