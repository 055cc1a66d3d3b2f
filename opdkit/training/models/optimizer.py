"""The student's trainable weights and the rule that moves them.

What is trained is float32 (or float64): the module's own parameters are the master weights. A bfloat16 computation
reads bfloat16 copies of them (`compute_weights`), made anew for every pass, so that gradients arrive in and add up in
float32, a 1e-6 step is not rounded away, and sampler and trainer are the same policy.

Where memory is short (`train.master_dtype`), the master weights are bfloat16 themselves. Then each is moved in float32,
one at a time, and rounded at random to one of its two neighbours, so that the mean over many steps is exact.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opdkit.errors import UserError
from opdkit.recipe import TrainSection
from opdkit.recipe.rules.device import check_optimizer
from opdkit.training.models.muon import Muon
from opdkit.types import seed_from


@dataclass(frozen=True, slots=True)
class StepResult:
    grad_norm: float  # before clipping; not finite if the step was skipped
    skipped: bool


class Optimizer:
    """AdamW, or Muon on the hidden matrices with AdamW on the rest; one learning rate, one schedule.

    seed: the run's, of which the random roundings of bfloat16 weights are drawn. Raises UserError for an optimizer that
    is not installed.
    """

    def __init__(self, module: nn.Module, section: TrainSection, *, compute_dtype: torch.dtype, seed: int = 0) -> None:
        self._seed = seed
        self._rounded = (-1, -1)  # (step, which update of it): the last time that weights were rounded at random
        self.section = section
        self.lr_factor = 1.0  # of the whole schedule: less in a run that went back to a checkpoint
        self.compute_dtype = compute_dtype
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert trained, "nothing to train"
        allowed = (torch.bfloat16,) if section.master_dtype == "bfloat16" else (torch.float32, torch.float64)
        for name, weight in trained.items():
            assert weight.dtype in allowed, f"{name} is trained in {weight.dtype}"
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        if hasattr(module, "get_output_embeddings") and module.get_output_embeddings() is not None:
            embeddings.add(id(module.get_output_embeddings().weight))
        hidden = {n for n, p in trained.items() if p.ndim == 2 and id(p) not in embeddings}
        self._is_adapter = all(".lora_" in name for name in trained)  # peft computes adapters in their own dtype
        self.weights = self._masters(trained, hidden)
        self._moved = self._movable(hidden)
        self._parts = _optimizers(self._moved, hidden, section)

    def _masters(self, trained: Mapping[str, nn.Parameter], hidden: Collection[str]) -> dict[str, nn.Parameter]:
        """What is trained, of the module's parameters. hidden: the names of the matrices that Muon takes."""
        return dict(trained)

    def _movable(self, hidden: Collection[str]) -> Mapping[str, nn.Parameter]:
        """What torch's optimizers are given: `weights`, or what stands for some of them while they are moved."""
        return self.weights

    def reserve(self) -> None:
        """Make what torch makes at the first step, so that a device without memory for it says so before anything else.

        For AdamW in float32: 8 bytes per trained parameter; in 8 bits: 2.
        """
        for part, _, p in self._owned():
            if p not in part.state:
                part.state[p] = {key: _zeros(part, key, p) for key in _kept(part)}

    def compute_weights(self, names: Collection[str] | None = None) -> dict[str, Tensor] | None:
        """The weights as the computation reads them, or of them only these; None where they are the module's own."""
        wanted = self.weights if names is None else {n: p for n, p in self.weights.items() if n in names}
        copies = {n: p.to(self.compute_dtype) for n, p in wanted.items() if p.dtype != self.compute_dtype}
        return None if self._is_adapter or not copies else copies

    def as_read(self, weight: Tensor) -> Tensor:
        """A master weight, or an average of it, as the computation reads it."""
        return weight if self._is_adapter else weight.to(self.compute_dtype)

    def whole(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that are kept as `weights` are, of the module's own shapes."""
        return kept

    def stand_ins(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same as `LanguageModel.using` takes them."""
        return kept

    def own_parts(self, whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole weights as `LanguageModel.using` takes them."""
        return whole

    @torch.no_grad()
    def all_as_read(self, wanted: bool) -> Mapping[str, Tensor] | None:
        """`compute_weights`, whole, for other readers than a pass. wanted: whether this rank needs them."""
        return self.compute_weights()

    def make_ready(self) -> None:
        """Before the passes of an update, where some rank may have none."""

    def collect(self) -> bool:
        """After them: whether there is anything to learn. If not, there are no gradients, not even zeros, so that the
        optimizer does not move on memory alone."""
        smallest_first = sorted(self.weights.values(), key=Tensor.numel)  # the first that is not zero says it
        if any(weight.grad is not None and weight.grad.any() for weight in smallest_first):
            return True
        self.zero_grad()
        return False

    def lr(self, step: int) -> float:
        """Learning rate of the step after `step` steps: linear warm-up, then the schedule down to 0 at the last."""
        s = self.section
        if step < s.warmup_steps:
            return s.lr * (step + 1) / (s.warmup_steps + 1) * self.lr_factor
        done = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[s.schedule]
        return s.lr * factor * self.lr_factor

    def step(self, step: int) -> StepResult:
        """Clip and apply the gathered gradients, then clear them. None at all, or one not finite, changes nothing."""
        norm = self._norm()
        grad_norm = 0.0 if norm is None else float(norm)
        skipped = norm is None or not math.isfinite(grad_norm)
        if norm is not None and not skipped:
            if self.section.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(list(self.weights.values()), self.section.max_grad_norm, norm)
            for part in self._parts:
                for group in part.param_groups:
                    _set_lr(group, self.lr(step))
            if self.section.master_dtype == "bfloat16":
                self._step_rounded(step)
            else:
                self._move()
        self.zero_grad()
        return StepResult(grad_norm, skipped)

    def _move(self) -> None:
        for part in self._parts:
            part.step()

    def _step_rounded(self, step: int) -> None:
        """Every bfloat16 weight is float32 while it is moved, alone, and then rounded at random by who it is, and by
        which update of which step it is."""
        self._rounded = (step, self._rounded[1] + 1 if self._rounded[0] == step else 0)
        gradients = {name: p.grad for name, p in self.weights.items()}
        self.zero_grad()
        for part, name, p in self._owned():
            gradient, rounded = gradients.pop(name), p.data
            if gradient is None:
                continue
            p.data = rounded.float()
            p.grad = gradient.float()
            del gradient
            part.step()
            generator = torch.Generator(p.device)
            generator.manual_seed(seed_from(self._seed, *self._rounded, "rounding", name) % 2**63)
            rounded.copy_(rounded_at_random(p.data, generator))
            p.grad = None
            p.data = rounded

    def _norm(self) -> Tensor | None:
        """Of the gathered gradients; None: there are none."""
        grads = [p.grad for p in self.weights.values() if p.grad is not None]
        return total_norm(grads) if grads else None

    def for_saving(self) -> Mapping[str, Tensor] | None:
        """The masters in host memory, on the first rank; None where the module itself holds them."""
        return None

    def to_save(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of tensors that a checkpoint has, by their keys, those that this rank writes."""
        return kept

    def rows_of(self, key: str) -> slice | None:
        """Which rows are kept here of a tensor of a checkpoint, by its key; None: all."""
        return None

    def zero_grad(self) -> None:
        for p in self.weights.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Flat, for safetensors: "<parameter>/<what>" -> tensor; {} before the first applied step.

        A parameter that has had no gradient yet is written with the zeros that its first one would find.
        """
        if not any(part.state for part in self._parts):
            return {}
        self.reserve()
        return self._tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError unless it is exactly what `state` gives for these parameters."""
        if not state:
            return
        self.reserve()
        own = self._tensors()
        check_tensors("optimizer", state, {name: tuple(tensor.shape) for name, tensor in own.items()})
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        """What it keeps, as plain tensors: of 8 bits, codes and the scales of their blocks."""
        found: dict[str, Tensor] = {}
        for part, name, p in self._owned():
            for key, kept in part.state[p].items():
                plain = {f"_{what}": getattr(kept, what) for what in ("codes", "scale") if hasattr(kept, what)}
                found |= {f"{name}/{key}{what}": tensor for what, tensor in (plain or {"": kept}).items()}
        return found

    def _owned(self) -> list[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        names = {id(p): n for n, p in self._moved.items()}
        return [(part, names[id(p)], p) for part in self._parts for group in part.param_groups for p in group["params"]]


NORM_BLOCK = 4096  # numbers summed in their own precision, at least float32; sums of blocks are float64


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """0-dim: the Euclidean norm of all gradients together, to 1e-6 however large they are and however they are split.

    torch's own is wrong by 1.4e-3 for 25 million float32 numbers on a CPU, and differently so for each split of them.
    Of bfloat16 gradients it is float32.
    """
    return sum_of_squares(grads).sqrt().to(_exact(grads[0])) if grads else torch.zeros(())


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """0-dim, float64."""
    return torch.stack([block.double().square().sum() for grad in grads for block in _block_norms(grad)]).sum()


def _block_norms(grad: Tensor) -> list[Tensor]:
    flat = grad.detach().reshape(-1)
    whole = len(flat) // NORM_BLOCK * NORM_BLOCK
    return [
        torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1, dtype=_exact(grad)),
        torch.linalg.vector_norm(flat[whole:], dtype=_exact(grad)).unsqueeze(0),
    ]


def _exact(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def check_tensors(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless `found` has exactly the wanted names and shapes. what: whose, of a checkpoint."""
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} is not one of the model's" for name in found.keys() - wanted.keys()]
    faults += [
        f"{name} is {list(tensor.shape)}, not {list(wanted[name])}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    if faults:
        raise UserError(
            f"the checkpoint's {what} does not fit the model: of its tensors, {len(faults)} are wrong (first: "
            f"{min(faults)}); restore its files, or begin again with --overwrite"
        )


def _kept(part: torch.optim.Optimizer) -> tuple[str, ...]:
    """What torch keeps of a parameter."""
    return ("momentum_buffer",) if isinstance(part, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")


def _zeros(part: torch.optim.Optimizer, key: str, p: nn.Parameter) -> Tensor:
    """What it begins with, in float32 where the weight is bfloat16."""
    if key == "step":
        return torch.zeros((), dtype=torch.float32, device=None if _has_8_bits(part) else p.device)
    dtype = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
    if _has_8_bits(part):
        made: Tensor = part._new_buffer(torch.empty_like(p, dtype=dtype), key == "exp_avg")
        return made
    return torch.zeros_like(p, dtype=dtype)


def _has_8_bits(part: torch.optim.Optimizer) -> bool:
    return type(part).__module__.startswith("torchao.")


def _set_lr(group: dict[str, Any], lr: float) -> None:
    """A compiled optimizer has a tensor there, so as not to be compiled anew."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def rounded_at_random(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16: up or down to a neighbour, with the chances whose mean is the number."""
    bits = numbers.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
    return torch.where(rounded.isfinite(), rounded, numbers.bfloat16())  # at the edge of the range, or no number


def _optimizers(
    weights: Mapping[str, nn.Parameter], hidden: Collection[str], section: TrainSection
) -> list[torch.optim.Optimizer]:
    """Weight decay falls on matrices only: pulling norms and biases to zero is nobody's intention."""
    muon = section.optimizer == "muon"
    kept = {n: p for n, p in weights.items() if p.numel()}  # of several ranks, some may have no part of it
    matrices = [p for n, p in kept.items() if muon and n in hidden]
    rest = [p for n, p in kept.items() if not (muon and n in hidden)]
    decayed, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # LoRA under Muon has only hidden matrices
    parts: list[torch.optim.Optimizer] = []
    if groups:
        if section.optimizer == "adamw_8bit":
            check_optimizer(section)
            from torchao.optim import AdamW8bit

            parts.append(AdamW8bit(groups, lr=section.lr, betas=section.betas))
        else:
            parts.append(torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True))
    if matrices:
        parts.append(Muon(matrices, lr=section.lr, weight_decay=section.weight_decay))
    return parts
