"""The parts of benchmarks/gpu.sh: `python gpu_parts.py NAME --device cuda` prints figures, a JSON line each."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import ROWS, TINY_ROWS, TINY_VOCABULARY, VOCABULARY, built, write_shape
from gpu_step import step_figures
from torch import Tensor

from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.losses import Divergence, Head, Support, Term, ViewTokens, head_loss
from opdkit.losses.kernels import kernel as kernels
from opdkit.losses.kernels.kernel_proof import prove
from opdkit.types import Asked

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "jsd": Divergence("jsd", teacher_share=0.5),
    "reverse_kl, student top-100": Divergence("reverse_kl", Support("student_topk", 100)),
    "forward_kl, teacher top-64": Divergence("forward_kl", Support("teacher_topk", 64)),
}


class Run:
    """Where the parts run, and how they tell."""

    def __init__(self, part: str, device: str, tiny: bool) -> None:
        self.part, self.device, self.tiny = part, torch.device(device), tiny
        self.scratch = Path(tempfile.mkdtemp(prefix="opdkit-gpu-"))
        self.dtype = torch.bfloat16
        torch.manual_seed(0)

    def tell(self, figure: str, **numbers: Any) -> None:
        print(json.dumps({"part": self.part, "figure": figure, **numbers}), flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """The least of several, behind one that is not counted."""
        run()
        times = []
        for _ in range(1 if self.tiny else repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def peak_gib(self, run: Callable[[], object]) -> float | None:
        """Beyond what was there before; None on a CPU."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)

    def model(self, shape: str, dtype: torch.dtype | None = None) -> LanguageModel:
        folder = write_shape(self.scratch / shape, shape, self.tiny)
        return built(folder, dtype=dtype or self.dtype, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale


def products(run: Run) -> None:
    """An odd vocabulary beside a multiple of 64, in the three products of a head."""
    width = 64 if run.tiny else 2048
    for num in (32,) if run.tiny else (442, 1792):
        for rows in (TINY_VOCABULARY, TINY_ROWS) if run.tiny else (VOCABULARY, ROWS):
            hidden, weight, grad = run.normal(num, width), run.normal(rows, width), run.normal(num, rows)
            times = {
                "forward": run.seconds(partial(torch.mm, hidden, weight.T)),
                "grad_hidden": run.seconds(partial(torch.mm, grad, weight)),
                "grad_weight": run.seconds(partial(torch.mm, grad.T, hidden)),
            }
            run.tell("product", tokens=num, rows=rows, **{k: round(v * 1e3, 4) for k, v in times.items()}, unit="ms")


def head(run: Run) -> None:
    """head_loss through the kernels (where proven), eager, and the bare products; the fraction of their roofline."""
    why = prove(run.device) if run.device.type == "cuda" else "no CUDA device"
    run.tell("kernels", proven=why is None, why=why)
    num, vocabulary, width = (96, TINY_VOCABULARY, 64) if run.tiny else (16384, VOCABULARY, 2048)
    hidden, weight = run.normal(num, width).requires_grad_(), run.normal(vocabulary, width, scale=0.05).requires_grad_()
    view = ViewTokens(
        hidden_NH=run.normal(num, width),
        head=Head(weight_VH=run.normal(vocabulary, width, scale=0.05), num_tokens=vocabulary),
    )
    ids = torch.randint(vocabulary, (num,), device=run.device)
    coef = torch.full((num,), 1 / num, device=run.device)

    def step(loss: Divergence) -> None:
        hidden.grad = weight.grad = None
        terms = [Term(name="loss", loss=loss, coef_N=coef)]
        head_loss(hidden, Head(weight_VH=weight, num_tokens=vocabulary), ids, terms, view).loss.backward()

    flops = 4 * 2 * num * vocabulary * width
    some = run.normal(1792 if num > 1792 else num, width)
    one_product = run.seconds(lambda: some @ weight.detach().T) * num / len(some)
    for name, loss in LOSSES.items():
        quick = run.seconds(partial(step, loss))
        peak = run.peak_gib(partial(step, loss))
        proven = set(kernels.proven)
        kernels.proven.clear()
        eager = run.seconds(partial(step, loss), repeats=1)
        kernels.proven.update(proven)
        run.tell(
            "head_loss", loss=name, tokens=num, vocabulary=vocabulary, width=width, seconds=round(quick, 5),
            eager_seconds=round(eager, 5), peak_gib=peak, tflops=round(flops / quick / 1e12, 2),
            share_of_products=round(4 * one_product / quick, 3),
        )  # fmt: skip


def decode(run: Run) -> None:
    """Tokens a second of the Hugging Face sampler, by rows; equal and unequal prompts."""
    model = run.model("1.7B")
    engine, tokens = HFEngine(model), 8 if run.tiny else 64
    for rows in (2, 4) if run.tiny else (3, 32, 128):
        for kind in ("equal", "unequal"):
            lengths = [64 if kind == "equal" else 16 + (row * 37) % 96 for row in range(rows)]
            prompts = [[5 + (row * 7 + place) % 20 for place in range(length)] for row, length in enumerate(lengths)]
            params = SamplingParams(max_answer_tokens=tokens)

            def sample(prompts: Any = prompts, params: Any = params, rows: int = rows) -> int:
                return sum(len(a.answer_ids) for a in engine.sample(prompts, list(range(rows)), params))

            count = sample()
            taken = run.seconds(sample, repeats=2)
            run.tell(
                "decode", shape="1.7B", rows=rows, prompts=kind, tokens_a_second=round(count / taken, 1),
                ms_a_step=round(taken / tokens * 1e3, 2), peak_gib=run.peak_gib(sample),
            )  # fmt: skip


def passes(run: Run) -> None:
    """Ragged rows beside equal ones of as many real tokens, and siblings of one prefix beside rows of distinct tokens:
    what packing, and reading a prefix once, leave of the ideal ratios 1 and (prefix + answers) / all."""
    model = run.model("1.7B")
    engine, asked, few = HFEngine(model), Asked("sampled"), run.tiny
    answers = [20 + (row * 97) % (30 if few else 480) for row in range(8 if few else 64)]
    mean = round(sum(answers) / len(answers))

    def timed(contexts: list[list[int]], answers: list[list[int]]) -> float:
        return run.seconds(lambda: engine.score(contexts, answers, asked), repeats=2)

    def ids(length: int, seed: int) -> list[int]:
        return [5 + (seed * 31 + place * 7) % 20 for place in range(length)]

    ragged = timed([ids(8, r) for r in range(len(answers))], [ids(n, r) for r, n in enumerate(answers)])
    equal = timed([ids(8, r) for r in range(len(answers))], [ids(mean, r) for r in range(len(answers))])
    run.tell("ragged", rows=len(answers), seconds=round(ragged, 4), over_equal=round(ragged / equal, 3))
    for prefix, answer in ((32, 8),) if few else ((512, 128), (1024, 256)):
        contexts = [ids(prefix, problem) for problem in range(1 if few else 4) for _ in range(8)]
        said = [ids(answer, row) for row in range(len(contexts))]
        together = timed(contexts, said)
        apart = timed([[5 + row % 20, *ids(prefix - 1, row)] for row in range(len(contexts))], said)
        ideal = (prefix + 8 * answer) / (8 * (prefix + answer))
        run.tell(
            "siblings", prefix=prefix, answer=answer, seconds=round(together, 4),
            over_distinct=round(together / apart, 3), ideal=round(ideal, 3),
        )  # fmt: skip


def long(run: Run) -> None:
    """Rows of 32k and 64k tokens: one is learned from, with checkpointing."""
    model = run.model("0.6B")
    model.checkpoint_activations()
    for length in (256,) if run.tiny else (32768, 65536):
        row = [5 + place % 20 for place in range(length)]

        def learn(row: list[int] = row) -> None:
            hidden = model.hidden([row[:64]], [row[64:]])
            hidden.backward(torch.ones_like(hidden))
            model.module.zero_grad(set_to_none=True)

        peak = run.peak_gib(learn)
        taken = run.seconds(learn, repeats=1)
        run.tell(
            "long row", tokens=length, seconds=round(taken, 3), peak_gib=peak, tokens_a_second=round(length / taken)
        )


def equal(run: Run) -> None:
    """Every divergence and support in float32 on the device and on the CPU, and bfloat16 beside float64."""
    generator = torch.Generator().manual_seed(0)
    # Numbers that bfloat16 has, so that all dtypes are given the same.
    inputs = [torch.randn(size, 64, generator=generator).bfloat16().float() for size in (40, 40, 501, 501)]

    def gradients(loss: Divergence, device: torch.device, dtype: torch.dtype) -> Tensor:
        hidden, seen, weight, other = (one.detach().to(device, dtype, copy=True) for one in inputs)
        hidden, weight = hidden.requires_grad_(), (weight / 8).requires_grad_()
        terms = [Term(name="d", loss=loss, coef_N=torch.full((40,), 1 / 40, device=device))]
        view = ViewTokens(hidden_NH=seen, head=Head(weight_VH=other / 8, num_tokens=499))
        ids = torch.arange(40, device=device)
        head_loss(hidden, Head(weight_VH=weight, num_tokens=499), ids, terms, view).loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return torch.cat([hidden.grad.flatten(), weight.grad.flatten()]).double().cpu()

    def apart(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    for name, loss in LOSSES.items():
        cpu = gradients(loss, torch.device("cpu"), torch.float32)
        exact = gradients(loss, torch.device("cpu"), torch.float64)
        run.tell(
            "gradient", loss=name, float32_from_cpu=apart(gradients(loss, run.device, torch.float32), cpu),
            bfloat16_from_float64=apart(gradients(loss, run.device, torch.bfloat16), exact),
        )  # fmt: skip


def draw(run: Run) -> None:
    """The same tokens as on the CPU, and NaN logits end in a sentence behind which the device still works."""
    from opdkit.engines.sampling.draw import draw as draw_tokens

    size, rows = (TINY_VOCABULARY if run.tiny else VOCABULARY), 64
    scores = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)) * 3
    uniform = torch.rand(rows, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for params in (SamplingParams(), SamplingParams(top_p=0.95, top_k=20)):
        here = draw_tokens(scores.to(run.device, copy=True), uniform.to(run.device), params)[0].cpu()
        there = draw_tokens(scores.clone(), uniform, params)[0]
        run.tell("drawn", top_p=params.top_p, rows=rows, same_as_cpu=int((here == there).sum()))
    model = run.model("0.6B")
    with torch.no_grad():
        model.module.get_input_embeddings().weight[7] = torch.nan
    try:
        HFEngine(model).sample([[5, 7]], [0], SamplingParams(max_answer_tokens=4))
        said = "nothing was said"
    except UserError as error:
        said = str(error)
    alive = float(torch.ones(3, device=run.device).sum()) == 3.0
    run.tell("not a number", refused="finite" in said, device_still_works=alive)


def step(run: Run) -> None:
    """Steps of a student under a teacher of a larger shape, beside what `opdkit plan` says."""
    for student, teacher in (("0.6B", "1.7B"), ("1.7B", "8B")):
        for figure in step_figures(run.scratch, student, teacher, run.device, run.tiny):
            run.tell("step", student=student, teacher=teacher, **figure)
        if run.tiny:
            return


def repeat(run: Run) -> None:
    """The same backward pass twice: are the bits the same."""
    model = run.model("0.6B")
    rows = [[5 + (row + place) % 20 for place in range(64 if run.tiny else 700)] for row in range(4)]

    def gradient() -> Tensor:
        model.module.zero_grad(set_to_none=True)
        hidden = model.hidden([row[:8] for row in rows], [row[8:] for row in rows])
        (hidden.float() ** 2).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])

    first, second = gradient(), gradient()
    apart = float((first.double() - second.double()).norm() / first.double().norm())
    run.tell("repeated", same_bits=bool(torch.equal(first, second)), relative_difference=apart)


def resume(run: Run) -> None:
    """A run that is killed goes on: its losses beside those of one that was not."""
    from opdkit.engines.scratch import char_tokenizer, make_model
    from opdkit.tasks import arithmetic
    from opdkit.toml import dumps

    make_model(
        run.scratch / "m", tokenizer=char_tokenizer(arithmetic.ALPHABET + "()"), hidden_size=64, num_layers=2, seed=0,
        max_positions=128,
    )  # fmt: skip

    def recipe(name: str) -> Path:
        file = run.scratch / f"{name}.toml"
        file.write_text(dumps({
            "name": name, "runs_dir": str(run.scratch / "runs"),
            "model": {"path": str(run.scratch / "m"), "device": str(run.device)},
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 64},
            "context": {"kind": "reference_solution", "template": "prefix"},
            "sampling": {"max_answer_tokens": 16}, "method": {"name": "opsd"},
            "train": {"steps": 6, "problems_per_step": 8, "lr": 1e-3, "save_every": 2},
        }))  # fmt: skip
        return file

    def train(name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "opdkit", "train", str(recipe(name)), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def losses(name: str) -> list[float]:
        file = run.scratch / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line["train/loss"] for line in lines if "train/loss" in line]

    killed, whole = train("killed"), train("whole")
    while killed.poll() is None and len(losses("killed")) < 3:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    whole.wait()
    assert train("killed", "--resume").wait() == 0, "the resumed run failed"
    pairs = list(zip(losses("killed"), losses("whole"), strict=True))
    run.tell("resumed", steps=len(pairs), largest_difference=max(abs(ours - theirs) for ours, theirs in pairs))


def tests(run: Run) -> None:
    """tests/gpu, which skip without a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    run.tell(
        "tests/gpu", status=done.returncode, summary=lines[-1] if lines else done.stderr[-300:], failed=failed[:20]
    )
    if done.returncode:
        sys.exit(1)


PARTS = {
    part.__name__: part for part in (products, head, decode, passes, long, equal, draw, step, repeat, resume, tests)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    PARTS[asked.part](Run(asked.part, asked.device, asked.tiny))
