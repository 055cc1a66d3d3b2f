"""Memory and time of `head_loss` beside dense autograd, measured in one run; writes docs/measurements/loss_memory.md.

    python benchmarks/loss_memory.py              # two to three minutes on two idle cores
    python benchmarks/loss_memory.py --repeats 5  # steadier minima

Memory is the peak of live bytes beyond inputs and outputs. On a CPU it is read from torch's allocator, every allocation
and release of one forward and backward pass in order; what the BLAS library holds for itself is not in it. On a GPU it
is `torch.cuda.max_memory_allocated`. Time is of one forward and backward pass; the two sides take turns, and the
minimum of each counts. On a CPU it is the processor time of this process, because a shared machine gives wall-clock by
chance (shown too; on an idle machine with one thread they are the same), and on a GPU wall-clock.

The dense side is what a careful person writes without a special kernel: one fp32 log-softmax per side on full logits,
the teacher's without a graph, `F.kl_div` where it fits, gradients by autograd. Both sides return the same: the loss,
its gradients for hidden states and head, and per token the loss, the entropy and the sampled token's log-probability.
Letters: N tokens, V vocabulary, H hidden width, K top-k entries.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses import Divergence, Head, Support, Target, Term, ViewTokens, head_loss
from opdkit.losses.head import CHUNK_BYTES

VOCABULARY, WIDTH, TOPK = 32768, 256, 100
SMALL, COMPARED, LARGE = 4096, 8192, 16384  # tokens
SELECTED, SHARES = 2048, (1.0, 0.5, 0.2, 0.05)  # tokens, and how many of them a selection keeps
PAGE = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "loss_memory.md"

LOSSES = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "jsd": Divergence("jsd", teacher_share=0.5),
    "reverse_kl, student top-100 + bucket": Divergence("reverse_kl", Support("student_topk", TOPK)),
}


@dataclass(frozen=True)
class Problem:
    """One set of inputs; `student_NH` and `weight_VH` take gradients."""

    student_NH: Tensor
    weight_VH: Tensor
    teacher_NH: Tensor
    teacher_weight_VH: Tensor
    ids_N: Tensor
    coef_N: Tensor

    @staticmethod
    def make(num_tokens: int, device: str) -> Problem:
        random = torch.Generator(device).manual_seed(num_tokens)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random, device=device) * scale

        return Problem(
            normal(num_tokens, WIDTH).requires_grad_(),
            normal(VOCABULARY, WIDTH, scale=0.2).requires_grad_(),
            normal(num_tokens, WIDTH),
            normal(VOCABULARY, WIDTH, scale=0.2),
            torch.randint(VOCABULARY, (num_tokens,), generator=random, device=device),
            torch.full((num_tokens,), 1 / num_tokens, device=device),
        )

    def take_gradients(self) -> Tensor:
        """Both gradients as one flat array, taken off the inputs."""
        leaves = (self.student_NH, self.weight_VH)
        flat = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        self.student_NH.grad = self.weight_VH.grad = None
        return flat


def opdkit_step(problem: Problem, spec: Divergence, chunk_size: int | None = None, num_views: int = 1) -> None:
    """With several views, each has a head of its own and the target sums their logits by weights that sum to 1."""
    head = Head(weight_VH=problem.weight_VH, num_tokens=VOCABULARY)
    teacher_head = Head(weight_VH=problem.teacher_weight_VH, num_tokens=VOCABULARY)
    view = ViewTokens(hidden_NH=problem.teacher_NH, head=teacher_head)
    views = {f"view{number}": view for number in range(num_views)}
    target = Target.of(dict.fromkeys(views, 1 / num_views))
    term = Term(name="loss", loss=spec, coef_N=problem.coef_N, target=target)
    head_loss(problem.student_NH, head, problem.ids_N, [term], views, chunk_size=chunk_size).loss.backward()


def dense_step(problem: Problem, spec: Divergence) -> None:
    student_NV = torch.log_softmax(problem.student_NH @ problem.weight_VH.T, -1)
    with torch.no_grad():
        teacher_NV = torch.log_softmax(problem.teacher_NH @ problem.teacher_weight_VH.T, -1)
        torch.linalg.vecdot(student_NV.exp(), student_NV).neg_()  # entropy
        student_NV.gather(-1, problem.ids_N.unsqueeze(-1))
    (_dense_divergence(spec, student_NV, teacher_NV) * problem.coef_N).sum().backward()


def _dense_divergence(spec: Divergence, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    if spec.support.kind == "student_topk":
        ids_NK = student_NV.detach().topk(TOPK, -1).indices
        student_NE, teacher_NE = (
            _with_bucket(student_NV.gather(-1, ids_NK)),
            _with_bucket(teacher_NV.gather(-1, ids_NK)),
        )
        return (student_NE.exp() * (student_NE - teacher_NE)).sum(-1)
    if spec.kind == "forward_kl":
        return F.kl_div(student_NV, teacher_NV, reduction="none", log_target=True).sum(-1)
    if spec.kind == "reverse_kl":
        return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    mixture_NV = torch.logaddexp(student_NV, teacher_NV) - torch.log(torch.tensor(2.0))
    to_student_N = F.kl_div(mixture_NV, student_NV, reduction="none", log_target=True).sum(-1)
    to_teacher_N = F.kl_div(mixture_NV, teacher_NV, reduction="none", log_target=True).sum(-1)
    return (to_student_N + to_teacher_N) * 2  # 1/2 each, and the continuous scale 1 / (1/2 * 1/2)


def _with_bucket(logprob_NK: Tensor) -> Tensor:
    log_mass_N1 = logprob_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprob_NK, torch.log(-torch.expm1(log_mass_N1))], -1)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass, measured."""

    seconds: float  # of the processor on a CPU, wall-clock on a GPU
    wall_s: float
    peak_mib: float  # beyond inputs and outputs
    gradients: Tensor  # both, flat


def run(step: Callable[[Problem, Divergence], None], problem: Problem, spec: Divergence, trace: bool = True) -> Pass:
    """One pass. Without `trace` a CPU's memory is not followed (peak_mib is NaN): following it slows small steps."""
    output_bytes = 4 * (problem.student_NH.numel() + problem.weight_VH.numel())
    if problem.student_NH.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_bytes, start_s = torch.cuda.memory_allocated(), time.perf_counter()
        step(problem, spec)
        torch.cuda.synchronize()
        elapsed_s = wall_s = time.perf_counter() - start_s
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = torch.profiler.profile(activities=activities, profile_memory=True) if trace else None
        with profile or nullcontext():
            start_s, wall_start_s = time.process_time(), time.perf_counter()
            step(problem, spec)
            elapsed_s, wall_s = time.process_time() - start_s, time.perf_counter() - wall_start_s
        peak_bytes = math.nan if profile is None else traced_peak_bytes(profile)
    return Pass(elapsed_s, wall_s, (peak_bytes - output_bytes) / 2**20, problem.take_gradients())


def traced_peak_bytes(profile: torch.profiler.profile) -> int:
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


@dataclass(frozen=True)
class Row:
    """One loss, measured."""

    name: str
    small_mib: float  # opdkit at N = 4096
    large_mib: float  # opdkit at N = 16384
    opdkit_mib: float  # at N = 8192, as all below
    dense_mib: float
    opdkit_s: float
    dense_s: float
    opdkit_wall_s: float
    dense_wall_s: float
    deviation: float  # of the two gradients, relative

    @property
    def meets_target(self) -> bool:
        grows = abs(self.large_mib / self.small_mib - 1)
        return grows <= 0.15 and self.opdkit_mib <= self.dense_mib / 8 and self.opdkit_s <= 0.7 * self.dense_s


def measure(name: str, spec: Divergence, device: str, repeats: int) -> Row:
    small_mib, large_mib = (run(opdkit_step, Problem.make(size, device), spec).peak_mib for size in (SMALL, LARGE))
    problem = Problem.make(COMPARED, device)
    pairs = [
        (run(opdkit_step, problem, spec, trace=number == 0), run(dense_step, problem, spec, trace=number == 0))
        for number in range(repeats)
    ]
    ours, dense = pairs[0]
    return Row(
        name,
        small_mib,
        large_mib,
        ours.peak_mib,
        dense.peak_mib,
        min(pair[0].seconds for pair in pairs),
        min(pair[1].seconds for pair in pairs),
        min(pair[0].wall_s for pair in pairs),
        min(pair[1].wall_s for pair in pairs),
        float((ours.gradients - dense.gradients).norm() / dense.gradients.norm()),
    )


@dataclass(frozen=True)
class Kept:
    """A forward KL of which only a share of the tokens counts, as under a selection of [weights]."""

    share: float
    whole_mib: float  # all logits that are formed, at one time
    chunked_mib: float
    seconds: float


def measure_kept(share: float, device: str, repeats: int) -> Kept:
    problem = Problem.make(SELECTED, device)
    counted = torch.arange(SELECTED, device=device) % round(1 / share) == 0  # spread over the tokens
    problem = replace(problem, coef_N=problem.coef_N * counted)

    def step(chunk_size: int | None) -> Callable[[Problem, Divergence], None]:
        return lambda problem, spec: opdkit_step(problem, spec, chunk_size)

    spec = LOSSES["forward_kl"]
    whole, chunked = run(step(SELECTED), problem, spec), run(step(None), problem, spec)
    seconds = min(run(step(None), problem, spec, trace=False).seconds for _ in range(repeats))
    return Kept(share, whole.peak_mib, chunked.peak_mib, seconds)


@dataclass(frozen=True)
class Views:
    """A forward KL to a target of several views."""

    count: int
    small_mib: float  # at N = 4096
    large_mib: float  # at N = 16384
    seconds: float  # at N = 4096


def measure_views(count: int, device: str, repeats: int) -> Views:
    def step(problem: Problem, spec: Divergence) -> None:
        opdkit_step(problem, spec, num_views=count)

    spec, small = LOSSES["forward_kl"], Problem.make(SMALL, device)
    large_mib = run(step, Problem.make(LARGE, device), spec).peak_mib
    seconds = min(run(step, small, spec, trace=False).seconds for _ in range(repeats))
    return Views(count, run(step, small, spec).peak_mib, large_mib, seconds)


def views_table(rows: list[Views]) -> str:
    lines = [f"| views | MiB, N={SMALL} | N={LARGE} | more a view | s |", "|---|---|---|---|---|"]
    for row in rows:
        more = (row.small_mib - rows[0].small_mib) / max(1, row.count - 1)
        lines.append(f"| {row.count} | {row.small_mib:.0f} | {row.large_mib:.0f} | {more:.0f} | {row.seconds:.2f} |")
    return "\n".join(lines)


def kept_table(rows: list[Kept]) -> str:
    lines = ["| kept | MiB, all logits at once | MiB, in chunks | s |", "|---|---|---|---|"]
    lines += [f"| {row.share:.0%} | {row.whole_mib:.0f} | {row.chunked_mib:.0f} | {row.seconds:.2f} |" for row in rows]
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    lines = [
        f"| loss | MiB, N={SMALL} | N={LARGE} | N={COMPARED} | dense | share | s | dense | share | wall | differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.small_mib:.0f} | {row.large_mib:.0f} "
            f"| {row.opdkit_mib:.0f} | {row.dense_mib:.0f} | 1/{row.dense_mib / row.opdkit_mib:.0f} "
            f"| {row.opdkit_s:.2f} | {row.dense_s:.2f} | {row.opdkit_s / row.dense_s:.2f} "
            f"| {row.opdkit_wall_s:.1f} / {row.dense_wall_s:.1f} | {row.deviation:.0e} |"
        )
    return "\n".join(lines)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return (
        f"{name}, {os.cpu_count()} cores with load {os.getloadavg()[1]:.0f}, {torch.get_num_threads()} thread(s) used"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="passes of each side, in turns; memory is of the first")
    parser.add_argument("--loss", choices=list(LOSSES), help="only this one; the page is not written")
    args = parser.parse_args()
    rows = []
    for name, spec in LOSSES.items():
        if args.loss in (None, name):
            rows.append(measure(name, spec, args.device, args.repeats))
            print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)
    if args.loss is None:
        PAGE.parent.mkdir(exist_ok=True)
        kept = [measure_kept(share, args.device, args.repeats) for share in SHARES]
        views = [measure_views(count, args.device, args.repeats) for count in (1, 2, 3)]
        PAGE.write_text(page(rows, kept, views, args.device, args.repeats))
        print(f"written to {PAGE}")
    missed = [row.name for row in rows if not row.meets_target]
    if missed:
        sys.exit(f"over target: {', '.join(missed)}")


def page(rows: list[Row], kept: list[Kept], views: list[Views], device: str, repeats: int) -> str:
    clock = "wall-clock" if device == "cuda" else "processor"
    return f"""# Memory and time of the loss

{table(rows)}

V = {VOCABULARY}, H = {WIDTH}, fp32, both heads of that size, the student's is trained. MiB: peak beyond inputs and
outputs. Dense: full logits, fp32 log-softmax, autograd, returning the same numbers. "s": {clock} seconds of a forward
and backward pass at N={COMPARED}, minimum of {repeats}, in turns with dense; "wall": the same by the clock on the wall,
opdkit / dense. "differ by": both gradients as one vector, relative norm of the difference.
Target: MiB does not grow with N (15 %), at most 1/8 of dense, in at most 0.7 of its time.

Four matrix products of N x H x V on either side (two projections, grad_hidden, grad_head) are most of the time, and
nothing can save them. The rest is elementwise: dense passes over [N, V] arrays in main memory, `head_loss` over blocks
that stay in cache.

## A selection of tokens

Tokens that a selection leaves out form no logits. Forward KL over N={SELECTED} tokens, of which a share counts:

{kept_table(kept)}

Logits at once grow with the kept tokens; in chunks they are bounded from the start, and what falls is the time.

## Several views

Forward KL to a target that sums the logits of several views, each with a head of its own:

{views_table(views)}

A view adds one array of a chunk's logits, {CHUNK_BYTES["cpu"] >> 20} MiB on a CPU, and
two of a block's; it does not grow with N.

{hardware(device)}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}.
Made by `python {" ".join(["benchmarks/loss_memory.py", *sys.argv[1:]])}`; the file says how each number is taken.
"""


if __name__ == "__main__":
    main()
