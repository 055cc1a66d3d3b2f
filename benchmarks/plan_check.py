"""What `opdkit plan` says beside what is measured, for seven models and settings; writes docs/measurements/plan.md.

    python benchmarks/plan_check.py            # about ten minutes on an idle core; what is measured already is kept
    python benchmarks/plan_check.py --again    # measure anew

Each setting is a process of its own (`plan_measure.py`): a random student (and teacher) trains, one step is traced and
others are timed. `plan` hears of the models from their config.json alone. The speed of this machine, which no table
has, is measured first: matrix products in both dtypes, and reading. So of seconds only ratios are compared: of each
moment, against the mean of all settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plan_measure import make_models, recipe_of

from opdkit.cost.devices import Device
from opdkit.cost.plan import Plan, Sizes, plan
from opdkit.cost.work import Lengths
from opdkit.recipe import parse_recipe

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "measurements" / "plan.md"
RESULTS = HERE / "results" / "plan_check.json"
MEMORY_WITHIN, TIME_WITHIN = 0.15, 0.30

SMALL = {"hidden_size": 256, "num_layers": 6}
WIDE = {"hidden_size": 512, "num_layers": 4}
DEEP = {"hidden_size": 192, "num_layers": 12}


def setting(
    student: dict[str, int], method: str, sampling: dict[str, Any], train: dict[str, Any], **more: Any
) -> dict[str, Any]:
    recipe = {"method": {"name": method}, "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **sampling}}
    recipe["train"] = {"steps": 50, "lr": 1e-4, "schedule": "constant", "warmup_steps": 0, **train}
    recipe |= {key: more.pop(key) for key in ("model", "context") if key in more}
    return {"student": student, "vocabulary": 8192, "recipe": recipe, **more}


SETTINGS = {
    "larger teacher, float32": setting(
        SMALL, "opd", {"group_size": 4, "max_answer_tokens": 64},
        {"problems_per_step": 6, "max_tokens_per_micro_batch": 2048},
        teacher=WIDE, model={"dtype": "float32"},
    ),
    "wide vocabulary, several micro-batches": setting(
        SMALL | {"num_layers": 3}, "opsd", {"max_answer_tokens": 48, "group_size": 2},
        {"problems_per_step": 8, "max_tokens_per_micro_batch": 256},
        vocabulary=16384, model={"dtype": "float32"},
        context={"kind": "reference_solution", "template": "prefix"},
    ),
    "bfloat16, teacher an average": setting(
        SMALL, "opsd", {"group_size": 2, "max_answer_tokens": 48},
        {"problems_per_step": 4, "max_tokens_per_micro_batch": 256},
        model={"dtype": "bfloat16"}, context={"kind": "reference_solution", "template": "prefix"},
        average={"kind": "self", "weights": "ema", "ema_rate": 0.05},
    ),
    "bfloat16, checkpointing": setting(
        DEEP, "opsa", {"group_size": 2, "max_answer_tokens": 64},
        {"problems_per_step": 5, "max_tokens_per_micro_batch": 4096},
        model={"dtype": "bfloat16", "gradient_checkpointing": True},
    ),
    "LoRA over bfloat16": setting(
        SMALL, "opsd", {"group_size": 2, "max_answer_tokens": 64},
        {"problems_per_step": 5, "max_tokens_per_micro_batch": 2048},
        model={"dtype": "bfloat16", "lora": {"r": 64, "alpha": 128}},
        context={"kind": "reference_solution", "template": "prefix"},
    ),
    "Muon, float32, long answers": setting(
        WIDE, "opd", {"group_size": 2, "max_answer_tokens": 192},
        {"problems_per_step": 3, "max_tokens_per_micro_batch": 512, "optimizer": "muon"},
        teacher=SMALL, model={"dtype": "float32"},
    ),
    "bfloat16 masters, half the layers checkpointed": setting(
        DEEP, "opd", {"group_size": 2, "max_answer_tokens": 64},
        {"problems_per_step": 5, "max_tokens_per_micro_batch": 2048, "master_dtype": "bfloat16"},
        teacher=SMALL, model={"dtype": "bfloat16", "gradient_checkpointing": 6},
    ),
}  # fmt: skip


def this_machine() -> dict[str, Any]:
    """As fast as large products and long reads are here, on one thread."""
    torch.set_num_threads(1)

    def rate(work: float, run: Any) -> float:
        run()
        best = math.inf
        for _ in range(5):
            start = time.process_time()
            run()
            best = min(best, time.process_time() - start)
        return work / best

    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((512, 256), (512, 256), (512, 512)))

        def passes(x: Any = inputs, w: Any = weight, g: Any = grad) -> None:
            torch.nn.functional.linear(x, w), g @ w, g.T @ x

        flops[str(dtype).removeprefix("torch.")] = rate(3 * 2.0 * 512 * 256 * 512, passes)
    array = torch.ones(1 << 24)
    what = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread used"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    rates = {"flops": flops, "bandwidth": rate(4.0 * (1 << 24), array.sum)}
    return {"rates": rates, "hardware": what, "versions": versions}


LAUNCH_S = 250e-6  # of one layer in one decoding step on this CPU, where its operations are small


def measured(one: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "plan_measure.py"), json.dumps(one)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def planned(one: dict[str, Any], found: dict[str, Any], device: Device) -> Plan:
    """From the configs alone, for the lengths that the measured step had."""
    with tempfile.TemporaryDirectory() as scratch:
        make_models(one, Path(scratch))
        for weights in Path(scratch).rglob("*.safetensors"):
            weights.unlink()  # the configs stay
        recipe = parse_recipe(recipe_of(one, Path(scratch)))
        lengths = Lengths(
            prompt=round(found["prompt_tokens"]),
            answer=round(found["answer_tokens"]),
            context=max(0, round(found["context_tokens"] - found["prompt_tokens"])),
        )
        return plan(recipe, Sizes(), device=device, lengths=lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    asked = parser.parse_args()
    kept = {} if asked.again or not RESULTS.exists() else json.loads(RESULTS.read_text(encoding="utf-8"))
    speed = kept.get("machine") or this_machine()
    found = {name: one for name, one in kept.get("settings", {}).items() if one["setting"] == SETTINGS.get(name)}
    for name, one in SETTINGS.items():
        if name not in found:
            found[name] = {"setting": one, "measured": measured(one)}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": speed, "settings": found}, indent=1) + "\n", encoding="utf-8")
    device = Device(name="this machine", capacity=1 << 34, launch_s=LAUNCH_S, is_cpu=True, **speed["rates"])
    said = {name: planned(SETTINGS[name], found[name]["measured"], device) for name in SETTINGS}
    rows = {name: figures(said[name], found[name]["measured"]) for name in SETTINGS}
    PAGE.write_text(page(rows, speed), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def figures(said: Plan, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By moment: bytes and seconds, planned and measured."""
    assert said.seconds is not None
    return {
        moment: {
            "planned": total, "measured": found["peaks"][moment],
            "planned_s": said.seconds[moment], "measured_s": found["seconds"][moment],
        }
        for moment, total in said.totals.items()
    }  # fmt: skip


def page(rows: dict[str, dict[str, dict[str, float]]], speed: dict[str, Any]) -> str:
    """Bytes by setting and moment, and seconds as shares of what all settings come to at that moment."""
    ratios = {(moment, dtype): _ratio(rows, moment, dtype) for moment in MOMENTS for dtype in ("float32", "bfloat16")}
    lines, apart, late = [], [], []
    for name, moments in rows.items():
        peak = max(moments, key=lambda moment: moments[moment]["measured"])
        for moment, one in moments.items():
            if not one["measured"]:  # nobody scores
                continue
            bytes_apart = one["planned"] / one["measured"] - 1
            if moment == peak:
                apart.append(abs(bytes_apart))
            cells = ["-", "-", "-"]
            if one["planned_s"] and one["measured_s"] > LEAST_S:
                expected = one["planned_s"] * ratios[moment, _dtype(name)]
                seconds_apart = expected / one["measured_s"] - 1
                late.append(abs(seconds_apart))
                cells = [f"{expected:.2f}", f"{one['measured_s']:.2f}", f"{seconds_apart:+.0%}"]
            mib = [f"{one[which] / 2**20:.1f}" for which in ("planned", "measured")]
            shown = f"**{moment}**" if moment == peak else moment
            lines.append(f"| {name if moment == 'sampling' else ''} | {shown} | {' | '.join(mib)} "
                         f"| {bytes_apart:+.0%} | {' | '.join(cells)} |")  # fmt: skip
    return TEXT.format(
        lines="\n".join(lines), memory=MEMORY_WITHIN, time=TIME_WITHIN, worst=max(apart), worst_s=max(late),
        within=sum(one <= MEMORY_WITHIN for one in apart), settings=len(apart),
        within_s=sum(one <= TIME_WITHIN for one in late), times=len(late),
        flops=speed["rates"]["flops"]["float32"] / 1e9, low=speed["rates"]["flops"]["bfloat16"] / 1e9,
        read=speed["rates"]["bandwidth"] / 1e9, hardware=speed["hardware"], versions=speed["versions"],
    )  # fmt: skip


def _dtype(name: str) -> str:
    return str(SETTINGS[name]["recipe"]["model"]["dtype"])


def _ratio(rows: dict[str, dict[str, dict[str, float]]], moment: str, dtype: str) -> float:
    """Measured over planned seconds, the median of the settings of a dtype."""
    some = [one[moment] for name, one in rows.items() if _dtype(name) == dtype]
    some = [one for one in some if one["planned_s"] and one["measured_s"] > LEAST_S]
    return statistics.median(one["measured_s"] / one["planned_s"] for one in some)


MOMENTS = ("sampling", "scoring", "update")
LEAST_S = 0.02  # of a moment; there is nothing to compare below
TEXT = """# `opdkit plan` beside measurements

What [`opdkit plan`](../inside/performance.md) says from configs alone, beside one measured step of each of seven
settings on a CPU. Bytes are live tensors at the peak of each moment, of torch's allocator; in bold the moment of the
highest peak. Seconds are of the processor. The machine's rates were measured first, and of seconds only ratios are
compared: the planned ones are multiplied by one number for each moment and dtype, the median of measured over planned
(this CPU has no instructions for bfloat16: its products go 2 to 15 GFLOP/s by their layout, which no formula knows).

| setting | moment | MiB planned | measured | off by | s planned | measured | off by |
|---|---|---|---|---|---|---|---|
{lines}

Of {settings} peaks, {within} are within {memory:.0%} (worst {worst:.0%}); of {times} times, {within_s} are within
{time:.0%} of what their ratio to the others should be (worst {worst_s:.0%}).

The two that are further off: under Muon, Newton-Schulz products are square ones in bfloat16, the slowest of all here;
with checkpointing, a second forward pass is counted at the mean rate, and forward products are faster than backward.

Not compared with any GPU yet: on one, the efficiencies and the time to start kernels are assumptions, and so is what
the allocator cannot use. `benchmarks/gpu.sh` will say.

{hardware}: products {flops:.0f} GFLOP/s in float32 and {low:.1f} in bfloat16 (forward and backward), reading
{read:.0f} GB/s; {versions}.
Made by `python benchmarks/plan_check.py`; kept in `benchmarks/results/plan_check.json`.
"""


if __name__ == "__main__":
    main()
