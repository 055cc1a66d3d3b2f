"""What is measured, at which sizes, and who stands beside opdkit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOSS_SIDES = ("opdkit", "products", "liger_compiled", "liger", "trl", "dense")
NOT_QUICK = ("liger_compiled",)  # compiling takes longer than all its runs
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
    sizes: list[tuple[int, int, int, tuple[str, ...]]] = [
        (32768, 256, 512 if quick else 2048, ("forward_kl", "reverse_kl", "jsd"))
    ]
    sizes += [(32768, 1024, 256 if quick else 1024, ("jsd",) if quick else ("forward_kl", "reverse_kl", "jsd"))]
    if not quick:
        sizes += [(151936, 1024, 256, ("reverse_kl",))]
    sides = tuple(side for side in LOSS_SIDES if not (quick and side in NOT_QUICK))
    return [
        Case("loss", "loss", f"loss {loss} {dtype} V={vocabulary} H={width} N={tokens}", sides,
             {"loss": loss, "dtype": dtype, "vocabulary": vocabulary, "width": width, "tokens": tokens})
        for vocabulary, width, tokens, losses in sizes for loss in losses for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def _growth(quick: bool) -> list[Case]:
    """What a loss takes, against tokens and vocabulary; what scoring and learning take, against siblings and prompt."""
    tokens = [(32768, 512), (32768, 2048)] if quick else [(32768, 1024), (32768, 4096), (32768, 16384)]
    vocabularies = [(8192, 512), (131072, 512)]
    found = [
        Case("growth of the loss", "loss", f"growth loss V={vocabulary} N={number}", ("opdkit", "trl"),
             {"loss": "reverse_kl", "dtype": "float32", "vocabulary": vocabulary, "width": 256, "tokens": number})
        for vocabulary, number in (*tokens, *vocabularies)
    ]  # fmt: skip
    sizes = [(1, 512), (8, 512), (8, 64)] if quick else [(1, 512), (2, 512), (4, 512), (8, 512), (8, 64), (8, 1024)]
    return found + [
        Case("growth of passes", "passes", f"growth {part} siblings={group} prompt={prompt}", ("opdkit", "padded"),
             {"part": part, "model": "small", "vocabulary": 32000, "problems": 1, "group": group, "prompt": prompt,
              "answer": 128})
        for part in ("score", "update") for group, prompt in sizes
    ]  # fmt: skip


def _steps(quick: bool) -> list[Case]:
    small = {"model": "small", "prompt": 32, "group": 4, "answer": 64}
    problems = {300: 4, 32000: 2, 151936: 1} if quick else {300: 16, 32000: 8, 151936: 2}
    left_out = {("sdpo", 300), ("opsd", 300), ("grpo", 300), ("opsd", 151936), ("grpo", 151936)} if quick else set()
    found = [
        Case("steps", "steps", f"step {method} V={vocabulary}",
             ("opdkit", *(peers[:1] if quick and vocabulary > 300 else peers)),
             {**small, "method": method, "vocabulary": vocabulary, "problems": count})
        for method, peers in PEERS.items() for vocabulary, count in problems.items()
        if (method, vocabulary) not in left_out
    ]  # fmt: skip
    ragged = {
        "model": "smollm2", "vocabulary": 49152, "problems": 1, "group": 8, "prompt": 64, "ragged": True,
        "answer": 200 if quick else 500,
    }  # fmt: skip
    return found + [
        Case("steps", "steps", f"step {method} SmolLM2 ragged", ("opdkit", side), {**ragged, "method": method})
        for method, side in (("opd", "distillation"), ("sdpo", "sdpo"))
        if not (quick and method == "sdpo")
    ]


def _passes(quick: bool) -> list[Case]:
    small = {"model": "small", "vocabulary": 32000}
    ragged = {**small, "problems": 2 if quick else 8, "group": 8, "prompt": 32, "answer": 500, "ragged": True}
    shared = {**small, "problems": 1, "group": 8, "prompt": 512 if quick else 1024, "answer": 128}
    found = [
        Case("passes", "passes", f"{part} {name}", ("opdkit", "padded"), {**sizes, "part": part})
        for part in ("score", "update") for name, sizes in (("ragged", ragged), ("shared", shared))
    ]  # fmt: skip
    rows = {"problems": 2 if quick else 8, "group": 8, "prompt": 32, "part": "sample"}
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
