"""docs/measurements/benchmarks.md from the kept results: tables only, with what each target asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import parts as where
from .cases import cases
from .compare import Lines, ratios, read

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "benchmarks.md"

TITLES = {
    "loss": "The loss alone",
    "growth of the loss": "Growth of the loss: tokens and vocabulary",
    "growth of passes": "Growth of scoring and learning: siblings and prompt",
    "steps": "Whole steps, without sampling",
    "passes": "Scoring and learning: ragged answers, shared prompts",
    "sampling": "Sampling",
    "start": "From nothing to the first line",
}
NOTES = {
    "loss": "`products` are the four bare matrix products, in fp32, which no loss over a whole vocabulary can do "
    "without. `error`: both gradients as one vector against autograd in fp64 on the same numbers. TRL's Triton kernels "
    "fall back to eager torch on a CPU; Liger's distillation loss is torch on every device (`liger_compiled`: through "
    "torch.compile, its default).",
    "steps": "Both sides get the same models, prompts and answers, in float32; all else of TRL's side is its own "
    "`trainer.train()`, with all answers in one micro-batch. Equal contexts: the teacher of `sdpo` reads one right "
    "sibling, that of `opsd` a solution of 32 tokens. SmolLM2: random weights of its shape, 8 siblings, answers of "
    "20 to 500 tokens. TRL's kernels fall back to eager torch on a CPU.",
    "passes": "`padded`: one batch padded to its longest row, as TRL's trainers make it, and TRL's loss.",
    "growth of passes": "One prompt, answers of 128 tokens, V = 32000.",
    "sampling": "Seconds per 1000 tokens of answer. `ragged`: a random model stops by chance. `generate`: "
    "transformers'.",
    "start": "Processor seconds of a fresh interpreter, to its end.",
}


def write(results: Path) -> None:
    parts = [
        "# Benchmarks beside other libraries",
        "Made by `make bench` (`benchmarks/bench.py`; its docstring says how each number is taken). Seconds are "
        "processor seconds of one thread, median [lowest, highest] of the runs, the sides taking turns; MiB: what the "
        "process came to hold beyond what it held before the run, its peak of all runs. Ratio: opdkit's seconds (and "
        "peak) over the peer's; below 1 opdkit is better. A line that a peer could not run says why.",
    ]
    for name, title in (("bench.jsonl", "Full run"), ("quick.jsonl", "Quick run")):
        path = results / name
        if not path.exists():
            parts.append(f"**{title}**: not run yet.")
            continue
        about, lines = read(path.read_text(encoding="utf-8"))
        parts += [f"## {title}", _about(about, lines), *_targets(lines)]
        measured = {line["case"] for line in lines}
        if left := [case.name for case in cases(about["quick"]) if case.name not in measured]:
            parts.append(f"Not measured yet: {'; '.join(left)}.")
        for group, heading in TITLES.items():
            own = [line for line in lines if line["group"] == group]
            if own:
                parts += [
                    f"### {heading}" + (" (quick)" if name.startswith("quick") else ""),
                    NOTES.get(group, ""),
                    _table(own),
                ]
        if any("parts" in line for line in lines):
            quick = " (quick)" if name.startswith("quick") else ""
            parts += [f"### {where.TITLE}{quick}", where.NOTE, where.table(lines)]
    parts += [
        "## On a GPU",
        "Not run yet: no GPU was at hand. `python benchmarks/head_kernel.py` measures the loss's Triton kernels there, "
        "with their share of the matrix-product roofline.",
    ]
    PAGE.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    print(f"written to {PAGE}")


def _about(about: dict[str, Any], lines: Lines) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    loads, runs = [line["load"] for line in lines], [line["runs"] for line in lines if "runs" in line]
    commits = list(dict.fromkeys(line["commit"] for line in lines))
    return (
        f"{about['machine']}, shared with other work: load {min(loads):g} to {max(loads):g} while this ran. "
        f"{versions}; opdkit at {', '.join(commits)}. At least {min(runs, default=0)} runs of each side."
    )


def _table(lines: Lines) -> str:
    found, peaks = ratios(lines), {(line["case"], line["side"]): line.get("peak_mib") for line in lines}
    with_error = any("error" in line for line in lines)
    header = [
        "case",
        "side",
        "CPU s",
        "wall s",
        "MiB",
        *(["error"] if with_error else []),
        "ratio of seconds",
        "of peaks",
    ]
    rows = [header, ["---"] * len(header)]
    for line in lines:
        case, side = line["case"], line["side"]
        if "failed" in line:
            rows.append([case, side, f"did not run: {line['failed'].replace('|', '/')}", *[""] * (len(header) - 3)])
            continue
        own, peak = peaks.get((case, "opdkit")), line.get("peak_mib")
        seconds = f"{line['cpu_s']:.3g} [{line['cpu_s_low']:.3g}, {line['cpu_s_high']:.3g}]"
        rows.append([
            case, side, seconds, f"{line['wall_s']:.3g}", "" if peak is None else f"{peak:.0f}",
            *([f"{line['error']:.1e}" if "error" in line else ""] if with_error else []),
            f"{found[case, side]:.2f}" if (case, side) in found else "",
            f"{own / peak:.2f}" if own is not None and peak and side not in ("opdkit", "products") else "",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _targets(lines: Lines) -> list[str]:
    """Each target, met or missed by the worst of the cases it speaks of."""
    found, by_key = ratios(lines), {(line["case"], line["side"]): line for line in lines}

    def worst(what: str, limit: float, values: dict[str, float]) -> list[str]:
        if not values:
            return [what, f"<= {limit:g}", "not measured", ""]
        case, value = max(values.items(), key=lambda item: item[1])
        return [
            what,
            f"<= {limit:g}",
            f"{value:.2g} ({case})",
            f"{'met' if value <= limit else 'missed'}, of {len(values)} measured",
        ]

    def of(side: str, *words: str, without: str = "nothing") -> dict[str, float]:
        return {
            case: ratio
            for (case, peer), ratio in found.items()
            if peer == side and all(word in case for word in words) and without not in case
        }

    def peak_of(side: str, *words: str) -> dict[str, float]:
        chosen = {}
        for case in of(side, *words):
            own, other = by_key[case, "opdkit"].get("peak_mib"), by_key[case, side].get("peak_mib")
            if own is not None and other:
                chosen[case] = own / other
        return chosen

    errors = {line["case"]: line["error"] for line in lines if line["side"] == "opdkit" and "bfloat16" in line["case"]}
    large = {**of("distillation", "step opd", "V=32000"), **of("distillation", "step opd", "V=151936")}
    sdpo = {**of("sdpo", "step sdpo", "V=32000"), **of("sdpo", "step sdpo", "V=151936")}
    rows = [
        ["target", "limit", "worst", ""],
        ["---"] * 4,
        worst("loss / compiled Liger, seconds", 1.0, of("liger_compiled", "loss")),
        worst("loss / bare products, H = 256", 1.2, of("products", "loss", "H=256")),
        worst("loss / bare products, H = 1024", 1.1, of("products", "loss", "H=1024")),
        worst("bf16 gradient error against fp64", 2.5e-3, errors),
        worst("step / TRL Distillation, V >= 32000", 0.5, large),
        worst("step / TRL SDPO, V >= 32000", 0.4, sdpo),
        worst("step / TRL Distillation, SmolLM2 ragged", 0.6, of("distillation", "SmolLM2")),
        worst("peak of a step / TRL Distillation", 0.5, peak_of("distillation", "step")),
        worst("peak of a step / TRL SDPO", 0.5, peak_of("sdpo", "step")),
    ]
    return ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
