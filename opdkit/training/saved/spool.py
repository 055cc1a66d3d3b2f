"""What teachers said, kept beside the rows of a run, so that other losses can be tried on the same answers.

    spool/spool.json                    {"version", "num_tokens", "absent_ids", "vocabulary", "views": {NAME: {"answer",
                                        "k", "entropy", "temperature"}}}: who was asked what. NAME: whoever read
    spool/step_000012.safetensors       the step's arrays, "<number>.<array>"; its metadata says whose they are. Of N
                                        ranks step_000012-00001-of-0000N.safetensors and so on, each with its own rows
    spool/head_<digest>.safetensors     heads that hidden states go through; one that does not move is there once

Hidden states answer every loss, list and temperature. A teacher that cannot give them (a server's lists) is kept as it
was asked: sampled and top-k log-probs, at the loss temperature. Arrays are mapped into memory when they are read.
The steps that are there are the first ones, without a gap: `spool.max_gib` ends it, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opdkit.losses import Head
from opdkit.metrics import Metric
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe.saved import spool_file, spool_files
from opdkit.recipe.sections import SpoolSection
from opdkit.run.folder import atomic_path, atomic_write
from opdkit.types import Asked, Rollout, Signal, View, base_name

VERSION = 1
DESCRIPTION = "spool.json"
LISTS = ("sampled_logprob_T", "topk_ids_TK", "topk_logprob_TK", "entropy_T")  # arrays of a Signal that are kept as are
FLOAT8 = torch.float8_e4m3fn


def reading_key(context_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """Of what was read, so that nobody is given what was said of something else."""
    text = f"{','.join(map(str, context_ids))};{','.join(map(str, answer_ids))}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """Of what the ids mean."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class Spool:
    """Of a run that is being written. described: what `spool.json` holds (`description`). Of several ranks each keeps
    what it heard; that all keep a step, or none, they agree."""

    def __init__(self, folder: Path, section: SpoolSection, described: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.folder, self._section, self._described, self._ranks = folder, section, described, ranks
        self._heads: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._num_left_out = 0

    def keep(
        self,
        step: int,
        temperature: float,
        rollouts: Sequence[Rollout],
        views: Sequence[Mapping[str, View]],
        signals: Sequence[Mapping[str, Signal]],
    ) -> None:
        """Write what was said here in this step (counted from 1), unless one before it was left out."""

        def begin() -> bool:
            path = self.folder / DESCRIPTION
            if not path.exists():
                self.folder.mkdir(exist_ok=True)
                atomic_write(path, json.dumps(self._described, indent=1) + "\n")
            return step == 1 or bool(spool_files(self.folder, step - 1))

        is_next = self._ranks.from_first(begin)
        if not is_next or not self._write(step, temperature, rollouts, views, signals):
            self._num_left_out += 1

    def metrics(self) -> list[Metric]:
        """Of all steps so far."""
        if not self._ranks.is_first:
            return []
        return [
            Metric("spool/gib", self._size() / 2**30, "last"),
            Metric("spool/num_steps_left_out", float(self._num_left_out), "last"),
        ]

    @property
    def is_full(self) -> bool:
        return self._num_left_out > 0

    def _write(
        self,
        step: int,
        temperature: float,
        rollouts: Sequence[Rollout],
        views: Sequence[Mapping[str, View]],
        signals: Sequence[Mapping[str, Signal]],
    ) -> bool:
        """Whether there is room. Every rank writes its new heads before its rows, so the heads of a step whose files
        are all there are there too."""
        tensors: dict[str, Tensor] = {}
        heads: dict[str, Head] = {}
        numbers: dict[int, int] = {}  # of a signal that several readings share
        index = []
        for rollout, read, said in zip(rollouts, views, signals, strict=True):
            for name, signal in said.items():
                view, digest = read[name], None
                if signal.head is not None:
                    digest = self._digest(signal.head)
                    heads[digest] = signal.head
                number = numbers.setdefault(id(signal), len(numbers))
                tensors |= {f"{number}.{array}": value for array, value in self._arrays(signal).items()}
                key = reading_key(view.context_ids, rollout.answer_ids)
                index.append([view.by or base_name(name), key, number, digest])
        sizes_here = {digest: _size(head.weight_VH) for digest, head in heads.items()}
        told = self._ranks.gather((sum(map(_size, tensors.values())), sizes_here))
        known = {digest: size for _, sizes in told for digest, size in sizes.items()}
        size, new = self._ranks.from_first(
            lambda: (self._size(), {digest for digest in known if not head_file(self.folder, digest).exists()})
        )
        if size + sum(rows for rows, _ in told) + sum(known[d] for d in new) > self._section.max_gib * 2**30:
            return False

        def write() -> Sequence[None]:
            for digest in sorted(new & heads.keys()):
                head = heads[digest]
                if next(rank for rank, (_, sizes) in enumerate(told) if digest in sizes) == self._ranks.rank:
                    facts = {"num_tokens": head.num_tokens, "logit_scale": head.logit_scale, "softcap": head.softcap}
                    _save(head_file(self.folder, digest), _head_arrays(head), facts)
            own = spool_file(self.folder, step, self._ranks.rank, self._ranks.size)
            _save(own, tensors, {"temperature": temperature, "index": index})
            return ()

        self._ranks.from_all(write)
        return True

    def _arrays(self, signal: Signal) -> dict[str, Tensor]:
        arrays = {}
        for name in LISTS:
            if (array := getattr(signal, name)) is not None:
                narrow = array.astype("int32") if name == "topk_ids_TK" else array
                arrays[name] = torch.from_numpy(narrow)
        if signal.hidden_TH is not None:
            arrays |= packed(signal.hidden_TH, self._section.dtype)
        return arrays

    def _digest(self, head: Head) -> str:
        """A head that did not move is not read again."""
        weight = head.weight_VH
        seen, version, known = self._heads.get(id(weight), (None, None, ""))
        if version == weight._version and seen is not None and seen() is weight:
            return known
        digest = hashlib.sha256(f"{head.num_tokens} {head.logit_scale} {head.softcap}".encode())
        for array in _head_arrays(head).values():
            digest.update(array.view(torch.uint8).numpy().data)
        known = digest.hexdigest()[:32]
        self._heads = {number: old for number, old in self._heads.items() if old[0]() is not None}
        self._heads[id(weight)] = (weakref.ref(weight), weight._version, known)
        return known

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def description(
    views: Mapping[str, Asked], temperature: float, *, num_tokens: int, absent_ids: Sequence[int], tokenizer: Any
) -> dict[str, Any]:
    """What `spool.json` holds. views: what each reader is asked."""
    return {
        "version": VERSION,
        "num_tokens": num_tokens,
        "absent_ids": list(absent_ids),
        "vocabulary": vocabulary_digest(tokenizer),
        "views": {reader: {**asdict(asked), "temperature": temperature} for reader, asked in views.items()},
    }


def head_file(folder: Path, digest: str) -> Path:
    return folder / f"head_{digest}.safetensors"


def packed(hidden_TH: Tensor, dtype: str | None) -> dict[str, Tensor]:
    """Hidden states as they are kept. float8 has a scale for each token: its largest entry becomes the format's."""
    hidden_TH = hidden_TH.detach().cpu()
    if dtype == "float8":
        largest = torch.finfo(FLOAT8).max
        scale_T1 = hidden_TH.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / largest
        return {"hidden_TH": (hidden_TH.float() / scale_T1).to(FLOAT8), "scale_T1": scale_T1}
    return {"hidden_TH": hidden_TH if dtype is None else hidden_TH.to(getattr(torch, dtype))}


def unpacked(arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[T, H] in `dtype`; the file's own memory where it was kept in it."""
    hidden_TH = arrays["hidden_TH"]
    if "scale_T1" in arrays:
        return (hidden_TH.float() * arrays["scale_T1"]).to(dtype)
    return hidden_TH.to(dtype)


def _head_arrays(head: Head) -> dict[str, Tensor]:
    """Rows beyond the vocabulary are not kept."""
    arrays = {"weight_VH": head.weight_VH, "bias_V": head.bias_V}
    rows = slice(head.num_tokens)
    kept = {name: array[rows].detach().cpu().contiguous() for name, array in arrays.items() if array is not None}
    return kept if head.absent_ids is None else {**kept, "absent_ids": head.absent_ids.cpu()}


def _save(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as unfinished:
        save_file(own, unfinished, metadata={"opdkit": json.dumps(told)})


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
