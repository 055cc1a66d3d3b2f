"""Where opdkit's seconds go: the processor's seconds of each operator, kind by kind.

Every operator that reaches torch's kernels passes through `Stopwatch`, which asks the thread's clock before and after,
so that a process that is put aside for a moment does not look like a slow operator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .compare import Lines

RUNS = 3
KINDS = HEAD, BODY, ATTENTION, EXPONENTIALS, OTHER = "head", "body", "attention", "exponentials", "other"
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
LOGARITHMS = ("softmax", "_softmax", "_log_softmax", "exp", "exp_", "log", "log_", "log1p", "expm1", "logaddexp")
TITLE = "Where opdkit's seconds go"
NOTE = (
    "Seconds of a run, operator by operator. Head: matrix products with the vocabulary; body: all others; "
    "exponentials: softmaxes and logarithms; other: all other operators, conversions and the optimizer's too; rest: "
    "what the median run took beyond these: Python's, autograd's, the allocator's (below 0 where the clock, asked "
    "around each operator, takes longer than they). System: what the kernel took of the median run, in whatever "
    "operator first wrote to a page: the machine is a virtual one, which hands free blocks of 2 MiB back to its host "
    "after two seconds and gets them anew at the next touch. Least: what nothing of this kind can do without, over "
    "what the target compares with: of a loss, the products and the exponentials over the products; of a step, the "
    "products and the attention over TRL's step."
)


class Stopwatch(TorchDispatchMode):
    """Adds up seconds by kind. vocabulary: what tells the head's products from others; None: all are the head's."""

    def __init__(self, vocabulary: int | None) -> None:
        super().__init__()
        self.vocabulary, self.seconds = vocabulary, dict.fromkeys(KINDS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        taken = time.thread_time() - begun
        sizes = {size for arg in args if isinstance(arg, Tensor) for size in arg.shape}
        of_head = self.vocabulary is None or self.vocabulary in sizes
        self.seconds[kind_of(func.overloadpacket.__name__, of_head)] += taken
        return result


def parts(run: Callable[[], Any], vocabulary: int | None = None) -> dict[str, float]:
    """Seconds of one run, by kind of operator: medians of a few."""
    found = []
    for _ in range(RUNS):
        with Stopwatch(vocabulary) as stopwatch:
            run()
        found.append(stopwatch.seconds)
    return {kind: statistics.median(seconds[kind] for seconds in found) for kind in KINDS}


def kind_of(name: str, of_head: bool) -> str:
    if name in PRODUCTS:
        return HEAD if of_head else BODY
    if "scaled_dot_product" in name:
        return ATTENTION
    return EXPONENTIALS if name in LOGARITHMS else OTHER


def table(lines: Lines) -> str:
    """Of the lines that have parts, the case's other sides among `lines`."""
    by_key = {(line["case"], line["side"]): line for line in lines}
    rows = [["case", "CPU s", *KINDS, "rest", "system", "least"]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        if "parts" not in line or "cpu_s" not in line:
            continue
        own = line["parts"]
        products, peer = by_key.get((line["case"], "products"), {}), by_key.get((line["case"], "sdpo"), {})
        least = ""
        if "cpu_s" in products:
            least = f"{1 + own[EXPONENTIALS] / products['cpu_s']:.2f}"
        elif "cpu_s" in peer:
            least = f"{(own[HEAD] + own[BODY] + own[ATTENTION]) / peer['cpu_s']:.2f}"
        rest = line["cpu_s"] - sum(own.values())
        numbers = [line["cpu_s"], *(own[kind] for kind in KINDS), rest, line["system_s"]]
        rows.append([line["case"], *(f"{number:.3f}" for number in numbers), least])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
