"""The optimizer on several ranks: each keeps a part of what is trained, and all of it only while a step is made.

    kept         float32 masters, gradients, moments, averages: 1 / ranks of each
    for a step   the weights as the computation reads them, gathered once an update, and float32 gradients of all of it

So passes need no hooks, a rank may make as many as it likes (or none), and sampling reads plain tensors. A parameter is
cut by rows, in equal parts of which the last ones are padded or empty; a matrix that Muon takes stays whole, on the
rank that has least so far, since its rule needs the matrix. The module's own parameters hold NaN that takes no memory:
a pass that does not ask for the gathered weights shows at once.

Letters: R rows of a parameter (its first dimension).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opdkit.ranks.base import dealt
from opdkit.ranks.group import Group
from opdkit.recipe import TrainSection
from opdkit.training.models.optimizer import Optimizer, StepResult, sum_of_squares


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows of a parameter each rank keeps."""

    shape: tuple[int, ...]
    num_ranks: int
    owner: int | None  # who keeps all of it; None: everyone keeps `part` rows, as long as there are any

    @property
    def part(self) -> int:
        return -(-self.shape[0] // self.num_ranks)

    def rows(self, rank: int) -> slice:
        if self.owner is not None:
            return slice(0, self.shape[0] if rank == self.owner else 0)
        return slice(min(rank * self.part, self.shape[0]), min((rank + 1) * self.part, self.shape[0]))


class GatheredOptimizer(Optimizer):
    """See `Optimizer`; `weights` are this rank's parts."""

    def __init__(self, module: nn.Module, section: TrainSection, *, compute_dtype: torch.dtype, group: Group) -> None:
        self._group = group
        self.cuts: dict[str, Cut] = {}
        self._gathered: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}  # float32, of gradients that come in another type
        self._has_gradient = False  # on some rank
        self._device = next(module.parameters()).device  # where passes are made
        super().__init__(module, section, compute_dtype=compute_dtype)

    def compute_weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """All weights as the computation reads them, gathered once after each movement; each is a leaf of the graph."""
        if self._gathered is None:
            read = {name: self.as_read(self.weights[name].detach()) for name in self._gathered_names}
            self._gathered = {name: whole.requires_grad_() for name, whole in self.whole(read).items()}
            for name, leaf in self._gathered.items():
                if leaf.dtype != self.weights[name].dtype:
                    leaf.register_post_accumulate_grad_hook(self._adding_to(name))
        return self._gathered

    def whole(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._whole(self.cuts[name], part) for name, part in kept.items()}

    def stand_ins(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.whole(kept)

    def make_ready(self) -> None:
        self.compute_weights()

    def collect(self) -> bool:
        leaves, summed = self.compute_weights(), self._summed()
        grads = {name: self._sums.pop(name, leaf.grad) for name, leaf in leaves.items()}
        reached = {name: grad for name, grad in grads.items() if grad is not None}
        told = self._group.gather((list(reached), any(bool(g.any()) for g in (*reached.values(), *summed.values()))))
        self._has_gradient = any(learns for _, learns in told)
        somewhere = {name for names, _ in told for name in names}  # what no pass reached has no gradient, not zeros
        for name in leaves if self._has_gradient else ():
            if name in somewhere:
                self.weights[name].grad = self._part_of_sum(name, grads.pop(name))
            leaves[name].grad = None
        for name, grad in summed.items() if self._has_gradient else ():
            self.weights[name].grad = grad
        if not self._has_gradient:
            self.zero_grad()
        return self._has_gradient

    def step(self, step: int) -> StepResult:
        result = super().step(step)
        self._gathered = None
        return result

    def zero_grad(self) -> None:
        super().zero_grad()
        self._has_gradient = False
        self._sums.clear()
        for leaf in (self._gathered or {}).values():
            leaf.grad = None

    def for_saving(self) -> dict[str, Tensor]:
        found = {}
        for name, part in self.weights.items():  # one at a time: an accelerator need not hold a second model
            whole = self._whole(self.cuts[name], part.detach())
            if self._group.is_first:
                found[name] = whole.cpu()
        return found

    def rows_of(self, key: str) -> slice | None:
        """Of a tensor in a checkpoint, whose key holds a parameter's name; None: all of them."""
        cut = next((self.cuts[name] for name in key.split("/") if name in self.cuts), None)
        return None if cut is None else cut.rows(self._group.rank)

    @property
    def _gathered_names(self) -> Collection[str]:
        """Of the weights that are gathered once an update."""
        return self.weights

    def _summed(self) -> dict[str, Tensor]:
        """Parts of gradients that the passes themselves have summed."""
        return {}

    def _masters(self, trained: Mapping[str, nn.Parameter], hidden: Collection[str]) -> dict[str, nn.Parameter]:
        muon = [name for name in trained if self.section.optimizer == "muon" and name in hidden]
        owners = dict(zip(muon, dealt([trained[name].numel() for name in muon], self._group.size), strict=True))
        masters = {}
        for name, parameter in trained.items():
            whole = parameter.detach()
            self.cuts[name] = cut = Cut(tuple(whole.shape), self._group.size, owners.get(name))
            masters[name] = nn.Parameter(self._kept(whole[cut.rows(self._group.rank)].clone()))
            parameter.data = whole.new_full((), torch.nan).expand(whole.shape)
        return masters

    def _kept(self, part: Tensor) -> Tensor:
        """Where parts are between the passes."""
        return part

    def _whole(self, cut: Cut, part: Tensor) -> Tensor:
        part = part.to(self._device)
        if cut.owner is not None:
            whole = part.clone() if cut.owner == self._group.rank else part.new_empty(cut.shape)
            self._group.send_from(cut.owner, whole)
            return whole
        own = part if len(part) == cut.part else _filled_up(part, cut.part)
        whole = part.new_empty(cut.part * self._group.size, *cut.shape[1:])  # of several copies, the first
        self._group.gather_rows(whole, own.contiguous())
        return whole[: cut.shape[0]]

    def _part_of_sum(self, name: str, grad: Tensor | None) -> Tensor:
        cut, master = self.cuts[name], self.weights[name]
        if grad is None:
            grad = torch.zeros(cut.shape, dtype=master.dtype, device=self._device)
        if cut.owner is not None:
            self._group.sum_on(cut.owner, grad)
            return grad if cut.owner == self._group.rank else torch.zeros_like(master)
        own = grad.new_empty(cut.part, *cut.shape[1:])
        self._group.sum_rows(own, _filled_up(grad, cut.part * cut.num_ranks))
        return self._kept(own[: len(master)])

    def _adding_to(self, name: str) -> Callable[[Tensor], None]:
        def add(leaf: Tensor) -> None:
            assert leaf.grad is not None
            if name in self._sums:
                self._sums[name].add_(leaf.grad)
            else:
                self._sums[name] = leaf.grad.to(self.weights[name].dtype)
            leaf.grad = None

        return add

    def _counts(self, name: str) -> bool:
        """Whether this rank's part of a weight is the one that is counted, and written: there may be several copies."""
        return True

    def _norm(self) -> Tensor | None:
        if not self._has_gradient:
            return None
        grads = [p.grad for n, p in self.weights.items() if p.grad is not None and p.numel() and self._counts(n)]
        device = next(iter(self.weights.values())).device
        own = float(sum_of_squares(grads)) if grads else 0.0
        return torch.tensor(math.sqrt(self._group.total([own], device)[0]), device=device)


def _filled_up(part: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros behind it."""
    if len(part) == num_rows:
        return part.contiguous()
    filled = part.new_zeros(num_rows, *part.shape[1:])
    filled[: len(part)] = part
    return filled
