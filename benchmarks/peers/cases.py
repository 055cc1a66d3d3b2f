"""What is measured, at which sizes, and who stands beside opdkit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOSS_SIDES = ("opdkit", "products", "liger_compiled", "liger", "trl", "dense")
NOT_QUICK = ("liger_compiled",)  # compiling takes longer than all its runs
KEPT_QUICK = {("opd", 300), ("opd", 32000), ("sdpo", 32000)}
PEERS = {"opd": ("distillation", "gkd", "gold"), "sdpo": ("sdpo",), "opsd": ("sdft",), "grpo": ("grpo",)}


@dataclass(frozen=True)
class Case:
    """group: the table of the page it stands in; name: unlike all others."""

    group: str
    kind: str
    name: str
    sides: tuple[str, ...]
    arguments: dict[str, Any]

    @property
    def shown(self) -> dict[str, Any]:
        return {key: value for key, value in self.arguments.items() if key != "commands"}


def cases(quick: bool) -> list[Case]:
    """Quick ones are the same in kind, with fewer tokens and fewer of them."""
    return [*_losses(quick), *_growth(quick), *_steps(quick), *_passes(quick), *_starts()]


def _losses(quick: bool) -> list[Case]:
    """In bfloat16 a CPU's own products are many times slower, so fewer tokens, and at the larger sizes fewer sides."""
    all_three, sided = ("forward_kl", "reverse_kl", "jsd"), ("opdkit", "products", "liger_compiled", "trl")
    sizes: list[tuple[str, int, int, int, tuple[str, ...], tuple[str, ...]]] = [
        ("float32", 32768, 256, 512, all_three, LOSS_SIDES),
        ("bfloat16", 32768, 256, 256, ("forward_kl", "jsd"), LOSS_SIDES),
        ("float32", 32768, 1024, 256, all_three, LOSS_SIDES),
        ("bfloat16", 32768, 1024, 128, ("reverse_kl",), sided),
        ("float32", 151936, 1024, 64, ("reverse_kl",), LOSS_SIDES),
        ("bfloat16", 151936, 1024, 64, ("reverse_kl",), sided),
    ]
    if quick:
        sizes = [(*size[:4], size[4][-1:], size[5]) for size in sizes[:3]]
    return [
        Case("loss", "loss", f"loss {loss} {dtype} V={vocabulary} H={width} N={tokens}",
             tuple(side for side in sides if not (quick and side in NOT_QUICK)),
             {"loss": loss, "dtype": dtype, "vocabulary": vocabulary, "width": width, "tokens": tokens})
        for dtype, vocabulary, width, tokens, losses, sides in sizes for loss in losses
    ]  # fmt: skip


def _growth(quick: bool) -> list[Case]:
    """What a loss takes, against tokens and vocabulary; what scoring and learning take, against siblings and prompt."""
    tokens = [(32768, 512), (32768, 2048)]
    vocabularies = [] if quick else [(8192, 512), (131072, 512)]
    found = [
        Case("growth of the loss", "loss", f"growth loss V={vocabulary} N={number}", ("opdkit", "trl"),
             {"loss": "reverse_kl", "dtype": "float32", "vocabulary": vocabulary, "width": 256, "tokens": number})
        for vocabulary, number in (*tokens, *vocabularies)
    ]  # fmt: skip
    sizes = [(8, 512)] if quick else [(1, 512), (2, 512), (4, 512), (8, 512), (8, 64), (8, 1024)]
    return found + [
        Case("growth of passes", "passes", f"growth {part} siblings={group} prompt={prompt}", ("opdkit", "padded"),
             {"part": part, "model": "small", "vocabulary": 32000, "problems": 1, "group": group, "prompt": prompt,
              "answer": 128})
        for part in ("score", "update") for group, prompt in sizes
    ]  # fmt: skip


def _steps(quick: bool) -> list[Case]:
    small = {"model": "small", "prompt": 32, "group": 4, "answer": 64}
    problems = {300: 4, 32000: 2, 151936: 1}
    left_out = {("opsd", 151936), ("grpo", 151936)}  # like sdpo and opd there: the head is nearly all
    if quick:
        left_out |= {(method, count) for method in PEERS for count in problems if (method, count) not in KEPT_QUICK}
    found = [
        Case("steps", "steps", f"step {method} V={vocabulary}",
             ("opdkit", *(peers[:1] if vocabulary > 300 else peers)),
             {**small, "method": method, "vocabulary": vocabulary, "problems": count})
        for method, peers in PEERS.items() for vocabulary, count in problems.items()
        if (method, vocabulary) not in left_out
    ]  # fmt: skip
    ragged = {
        "model": "smollm2", "vocabulary": 49152, "problems": 1, "group": 8, "prompt": 64, "ragged": True,
        "answer": 500,
    }  # fmt: skip
    smollm2 = Case("steps", "steps", "step opd SmolLM2 ragged", ("opdkit", "distillation"), {**ragged, "method": "opd"})
    return found if quick else [*found, smollm2]


def _passes(quick: bool) -> list[Case]:
    small = {"model": "small", "vocabulary": 32000}
    ragged = {**small, "problems": 2 if quick else 8, "group": 8, "prompt": 32, "answer": 500, "ragged": True}
    shared = {**small, "problems": 1, "group": 8, "prompt": 512 if quick else 1024, "answer": 128}
    found = [
        Case("passes", "passes", f"{part} {name}", ("opdkit", "padded"), {**sizes, "part": part})
        for part in ("score", "update") for name, sizes in (("ragged", ragged), ("shared", shared))
    ]  # fmt: skip
    rows = {"problems": 2, "group": 8, "prompt": 32, "part": "sample"}
    return found + [
        Case("sampling", "passes", f"sample {name} V={vocabulary}", ("opdkit", "generate"),
             {**rows, **sizes, "model": "small", "vocabulary": vocabulary})
        for vocabulary in (300, 32000) if not (quick and vocabulary == 300)
        for name, sizes in (
            ("equal", {"answer": 64}),
            ("ragged", {"answer": 200 if quick else 400, "stop_every": 60 if quick else 100}),
        )
    ]  # fmt: skip


def _starts() -> list[Case]:
    commands = {
        "import": {
            "opdkit": ["-c", "from opdkit.losses import head_loss"],
            "trl": ["-c", "from trl import DistillationTrainer"],
        },
        "command": {
            "opdkit": ["-m", "opdkit", "--help"],
            "trl": ["-c", "import sys; from trl.cli import main; sys.argv = ['trl', '--help']; main()"],
        },
    }
    return [
        Case("start", "start", f"start {what}", tuple(sides), {"commands": sides}) for what, sides in commands.items()
    ]
