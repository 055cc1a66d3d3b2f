"""The optimizer of a student whose layers are in parts (`engines/shards.py`): what is outside the layers is gathered
once an update, as `gathered.py` does it, and the layers' gradients come summed.

What is kept, and so every checkpoint, is as there: a run may go on with the other strategy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from opdkit.engines.model import LanguageModel
from opdkit.engines.shards import Shards
from opdkit.ranks.base import dealt
from opdkit.ranks.group import Group
from opdkit.recipe import TrainSection
from opdkit.training.models.gathered import Cut, GatheredOptimizer


class ShardedOptimizer(GatheredOptimizer):
    """See `GatheredOptimizer`. The masters of the layers lie in the memory that passes read.

    Muon's rule needs a whole matrix: each in turn is gathered and moved by one rank, which keeps its momentum.
    """

    def __init__(
        self,
        student: LanguageModel,
        section: TrainSection,
        *,
        compute_dtype: torch.dtype,
        group: Group,
        offload: bool = False,
    ) -> None:
        """offload: masters and moments are in host memory, as the layers' parts are."""
        assert student.shards is not None
        self._shards: Shards = student.shards
        self._copy, self._place = divmod(group.rank, self._shards.num_parts)
        self._offload = offload
        self._whole_cuts: dict[str, Cut] = {}  # of the matrices that Muon takes
        super().__init__(student.module, section, compute_dtype=compute_dtype, group=group)

    def stand_ins(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: part if n in self._shards else self._whole(self.cuts[n], part) for n, part in kept.items()}

    def own_parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: self.cuts[name].rows(self._place) for name in whole if name in self._shards}
        return {name: weight[own[name]] if name in own else weight for name, weight in whole.items()}

    @torch.no_grad()
    def all_as_read(self, wanted: bool) -> dict[str, Tensor]:
        """The layers' in host memory: no accelerator need hold all of them."""
        found = dict(self.compute_weights())
        for name, part in self.weights.items():
            if name in self._shards:
                whole = self._whole(self.cuts[name], self.as_read(part.detach()))
                found |= {name: whole.cpu()} if wanted else {}
        return found

    def zero_grad(self) -> None:
        super().zero_grad()
        self._shards.zero_grad()

    def rows_of(self, key: str) -> slice | None:
        name, _, what = key.rpartition("/")
        if what == "momentum_buffer" and name in self._whole_cuts:
            return self._whole_cuts[name].rows(self._group.rank)
        in_parts = next((name for name in key.split("/") if name in self._shards), None)
        return super().rows_of(key) if in_parts is None else self.cuts[in_parts].rows(self._place)

    def to_save(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        def is_ours(key: str) -> bool:
            name, _, what = key.rpartition("/")
            is_momentum = what == "momentum_buffer" and name in self._whole_cuts
            return is_momentum or all(self._counts(part) for part in key.split("/"))

        return {key: tensor for key, tensor in kept.items() if is_ours(key)}

    @property
    def _gathered_names(self) -> Collection[str]:
        return [name for name in self.weights if name not in self._shards]

    def _summed(self) -> dict[str, Tensor]:
        return {name: grad for name, grad in self._shards.gradients().items() if name in self.weights}

    def _kept(self, part: Tensor) -> Tensor:
        return part.cpu() if self._offload else part

    def _counts(self, name: str) -> bool:
        return self._copy == 0 or name not in self._shards

    def _masters(self, trained: Mapping[str, nn.Parameter], hidden: Collection[str]) -> dict[str, nn.Parameter]:
        outside = {name: parameter for name, parameter in trained.items() if name not in self._shards}
        found = super()._masters(outside, hidden)
        for name, parameter in trained.items():
            if name in self._shards:
                self.cuts[name] = cut = Cut(tuple(parameter.shape), self._shards.num_parts, None)
                found[name] = nn.Parameter(self._shards.part(name))
                rows = cut.rows(self._place)
                assert len(found[name]) == rows.stop - rows.start
        return {name: found[name] for name in trained}

    def _movable(self, hidden: Collection[str]) -> Mapping[str, nn.Parameter]:
        muon = [n for n in self.weights if self.section.optimizer == "muon" and n in hidden and n in self._shards]
        owners = dealt([self.weights[name].numel() for name in muon], self._group.size)
        moved = dict(self.weights)
        for name, owner in zip(muon, owners, strict=True):
            self._whole_cuts[name] = Cut(self.cuts[name].shape, self._group.size, owner)
            moved[name] = nn.Parameter(self._nothing(name))
        return moved

    def _nothing(self, name: str) -> Tensor:
        """In the place of a matrix that is not there now: its shape, of the rank that moves it."""
        cut = self._whole_cuts[name]
        return self.weights[name].new_full((), torch.nan).expand(cut.shape)[cut.rows(self._group.rank)]

    def _move(self) -> None:
        super()._move()  # Muon's matrices have no gradient yet
        for name, weight in self._moved.items():
            if name not in self._whole_cuts:
                weight.grad = None  # or each turn of Muon would move the matrices outside the layers once more
        muon = next((part for part in self._parts if isinstance(part, torch.optim.Muon)), None)
        for name, whole_cut in self._whole_cuts.items():
            master, moved, cut = self.weights[name], self._moved[name], self.cuts[name]
            if master.grad is None:
                continue
            whole, grad = self._whole(cut, master.detach()), self._whole(cut, master.grad)
            if whole_cut.owner == self._group.rank:
                assert muon is not None
                moved.data, moved.grad = whole, grad
                muon.step()
                moved.data, moved.grad = self._nothing(name), None
            assert whole_cut.owner is not None
            self._group.send_from(whole_cut.owner, whole)
            master.data.copy_(whole[cut.rows(self._place)])
