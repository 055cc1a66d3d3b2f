"""The loss's Triton kernels beside its eager path and the bare matrix products, on a CUDA device.

    python benchmarks/head_kernel.py              # bf16, V = 151669, H = 2048: Qwen3-1.7B
    python benchmarks/head_kernel.py --json

Of each loss: seconds of a forward and backward pass, median of `--repeats` in turns; peak memory; and the fraction of
the matrix-product roofline, which is the time of the four products (two projections, grad_hidden, grad_head, in the
same chunks and dtypes) over the whole. The kernels are first proven equal to the eager path; without a CUDA device, or
where they are not equal, that is said and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.losses import Divergence, Head, Support, Term, ViewTokens, head_loss
from opdkit.losses.head import chunks
from opdkit.losses.heads import Projector
from opdkit.losses.kernels import kernel
from opdkit.losses.kernels.kernel_proof import prove

LOSSES = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "jsd": Divergence("jsd", teacher_share=0.5),
    "reverse_kl, student top-100 + bucket": Divergence("reverse_kl", Support("student_topk", 100)),
}


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mib(run: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class Problem:
    """Inputs on the device; bf16 states and heads, as in training."""

    def __init__(self, num_tokens: int, vocabulary: int, width: int, device: torch.device) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

        self.hidden_NH, self.weight_VH = (
            normal(num_tokens, width).requires_grad_(),
            normal(vocabulary, width, scale=0.05),
        )
        self.weight_VH.requires_grad_()
        self.head = Head(weight_VH=self.weight_VH, num_tokens=vocabulary)
        other = Head(weight_VH=normal(vocabulary, width, scale=0.05), num_tokens=vocabulary)
        self.view = ViewTokens(hidden_NH=normal(num_tokens, width), head=other)
        self.ids_N = torch.randint(vocabulary, (num_tokens,), device=device)
        self.coef_N = torch.full((num_tokens,), 1 / num_tokens, device=device)

    def loss(self, spec: Divergence) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None
        term = Term(name="loss", loss=spec, coef_N=self.coef_N)
        head_loss(self.hidden_NH, self.head, self.ids_N, [term], self.view).loss.backward()

    @torch.no_grad()
    def products(self) -> None:
        own, rows_N = Projector(self.head, self.hidden_NH), torch.arange(len(self.hidden_NH), device=self.ids_N.device)
        assert self.view.head is not None and self.view.hidden_NH is not None
        other = Projector(self.view.head, self.view.hidden_NH)
        grad_VH = torch.zeros_like(own.head.weight_VH, dtype=torch.float32)
        for rows in chunks(rows_N, self.head.num_tokens, self.hidden_NH.shape[-1]):
            own(rows), other(rows)
            grad_nV = own._output[: len(rows)].bfloat16()
            grad_nV @ own.head.weight_VH
            grad_VH += torch.mm(grad_nV.T, own.hidden(rows), out_dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=151669)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object a line in place of a table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine: nothing to measure (`make test-triton` checks the kernels on a CPU)")
    device = torch.device("cuda", torch.cuda.current_device())
    if sentence := prove(device):
        sys.exit(sentence)
    problem = Problem(args.tokens, args.vocabulary, args.width, device)
    if not args.json:
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
            f"N={args.tokens}, V={args.vocabulary}, H={args.width}, bf16"
        )
        print("| loss | products s | kernels s | eager s | kernels / eager | share of the roofline | MiB | eager MiB |")
        print("|---|---|---|---|---|---|---|---|")
    for name, spec in LOSSES.items():
        taken: dict[str, list[float]] = {"products": [], "kernels": [], "eager": []}
        peaks: dict[str, float] = {}
        for number in range(args.repeats + 1):
            for side in taken:
                kernel.proven.discard(device)
                if side == "kernels":
                    kernel.proven.add(device)
                run = problem.products if side == "products" else lambda spec=spec: problem.loss(spec)
                if number:  # the first compiles
                    taken[side].append(seconds(run))
                else:
                    peaks[side] = peak_mib(run)
        medians = {side: statistics.median(found) for side, found in taken.items()}
        share = medians["products"] / medians["kernels"]
        if args.json:
            print(json.dumps({"loss": name, "seconds": medians, "roofline": share, "peak_mib": peaks}), flush=True)
        else:
            shown = [f"{medians[side]:.4f}" for side in taken] + [
                f"{medians['kernels'] / medians['eager']:.2f}",
                f"{share:.2f}",
            ]
            shown += [f"{peaks[side]:.0f}" for side in ("kernels", "eager")]
            print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
