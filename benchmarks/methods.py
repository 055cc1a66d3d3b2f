"""Every method on one built-in task, from one student, with the same number of answers; writes
docs/measurements/methods_table.md.

    python benchmarks/methods.py                    # all arms, 3 seeds: half an hour of one core
    python benchmarks/methods.py --only sdpo        # the arms of one method, and the page from all that is there
    python benchmarks/methods.py --only mopd --try 3e-4 1e-3 3e-3    # learning rates, on a seed that is not in the page

Two models are made, as `opdkit make-model --reads-demonstrations` makes them: a student that is half taught to add
three digits and uses demonstrations well, and a teacher that adds well. A seed is that of an arm: its problems, their
order, its answers, its peers. Every arm is an ordinary run of `methods.toml` with what `ARMS` changes, through the
public door (`load_recipe`, `train`), in a process of its own, so that its peak memory is its own. Stop it when you
like: finished arms are kept in runs/methods/results/, a stopped one goes on from its checkpoint, and an arm whose
recipe has changed is run anew.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods_page import write_page
from methods_reading import measure_reading
from rich.console import Console

from opdkit.errors import Interrupted, UserError
from opdkit.evaluation.evaluate import evaluate_model
from opdkit.evaluation.options import EvaluateOptions
from opdkit.measure.accuracy import Accuracy
from opdkit.methods import METHODS
from opdkit.recipe import Recipe, load_recipe
from opdkit.run.folder import RunFolder, atomic_write
from opdkit.training.loop import train
from opdkit.training.make_model import BATCH, lessons, make_model
from opdkit.training.problems.demonstrations import WORDING

RECIPE = Path(__file__).with_suffix(".toml")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "methods_table.md"
FOLDER = Path("runs/methods")
WORLD = "arithmetic:add-3"
SEEDS = (0, 1, 2)
TRIAL_SEED = 3

# Steps of 64 lessons, Muon. The student's bare problems are the same 512 again and again, and it is stopped half-way.
# The teacher's are new ones, and it reads no demonstrations.
MODELS: Mapping[str, dict[str, Any]] = {
    "student": {
        "seed": 100,
        "num_layers": 2,
        "steps": 300,
        "lr": 4e-3,
        "schedule": "constant",
        "limit": 512,
        "reads": True,
    },
    "teacher": {
        "seed": 10,
        "num_layers": 3,
        "steps": 300,
        "lr": 8e-3,
        "schedule": "linear",
        "limit": None,
        "reads": False,
    },
}

EXTERNAL = ("teacher.kind=model",)  # the path is the seed's
INITIAL = ("teacher.kind=self", "teacher.weights=initial")
SHOWN = {key: getattr(WORDING, key) for key in ("layout", "success", "another", "failure")}
MARKED = "context.wording={" + ", ".join(f"{key} = {json.dumps(text)}" for key, text in SHOWN.items()) + "}"
PEERS = ("context.kind=peers", "context.feedback=never", MARKED)
SOLUTION = ("context.kind=reference_solution", "context.template=prefix")
# Hints of both kinds in the one form that the student reads as right: the contrast is between what they say.
HINT = f"{{ layout = {json.dumps(WORDING.layout)}, success = '({{text}})', failure = '({{text}})' }}"
HINTS = tuple(f"views.{view}.context.wording={HINT}" for view in ("right", "wrong"))
EACH_ITS_OWN = ("sampling.group_size=1", "train.problems_per_step=128")


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table: a method, the learning rate that suits it, and what else differs from its defaults."""

    method: str
    lr: float
    settings: tuple[str, ...] = ()
    about: str = ""  # what tells it from the other arms of the method


ARMS: Mapping[str, Arm] = {
    "opd": Arm("opd", 4e-3, EXTERNAL),
    "topk_opd": Arm("topk_opd", 4e-3, (*EXTERNAL, "method.k=4"), "4 candidates of the student"),
    "grpo_opd": Arm("grpo_opd", 4e-3, EXTERNAL),
    "opd-mixed_kl": Arm(
        "opd", 4e-3, (*EXTERNAL, "method.divergence=mixed_kl", "method.reverse_share=0.25"), "KL mixing, 3/4 forward"
    ),
    "exopd": Arm("exopd", 1e-3, EXTERNAL, "the sampled token"),
    "exopd-full": Arm("exopd", 4e-3, (*EXTERNAL, "method.support=full"), "the whole vocabulary"),
    "dopd": Arm(
        "dopd",
        1e-3,
        (*EXTERNAL, "context.kind=none", "views.hinted.context.template=prefix"),
        "the teacher, who reads no demonstrations, without hints",
    ),
    "opsd": Arm("opsd", 1e-3, (*INITIAL, *SOLUTION)),
    "pw_opsd": Arm("pw_opsd", 1e-3, (*INITIAL, *SOLUTION)),
    "eopd": Arm("eopd", 1e-3, (*INITIAL, *SOLUTION)),
    "reopold": Arm("reopold", 1e-3, (*INITIAL, *SOLUTION, "method.switch_step=20")),
    "sr_opsd": Arm("sr_opsd", 1e-3, SOLUTION),
    "sdpo": Arm("sdpo", 1e-3, (*INITIAL, *PEERS), "frozen teacher"),
    "sdpo-ema": Arm("sdpo", 1e-3, ("teacher.ema_rate=0.05", *PEERS), "the paper's teacher: average of the student"),
    "sdpo-live": Arm("sdpo", 1e-3, ("teacher.kind=self", "teacher.weights=live", *PEERS), "live teacher"),
    "mopd": Arm("mopd", 1e-3, (*INITIAL, *PEERS), "right, right, wrong; frozen teacher"),
    "mopd-positive": Arm(
        "mopd", 1e-3, (*INITIAL, *PEERS, 'context.slots=["success", "success"]'), "right, right; frozen teacher"
    ),
    "grpo": Arm("grpo", 1e-3),
    "rlsd": Arm("rlsd", 1e-3, (*SOLUTION, "method.fade_steps=20"), "live teacher, fading over half of the steps"),
    "rlcsd": Arm("rlcsd", 1e-3, HINTS),
    "srpo": Arm("srpo", 1e-3, PEERS),
    "i_sdpo": Arm("i_sdpo", 1e-3, SOLUTION),
    "opsa": Arm("opsa", 1e-4, (), "the control without a teacher"),
    "dpo": Arm("dpo", 3e-4, INITIAL),
    "simpo": Arm("simpo", 3e-4),
    "verified_sft": Arm("verified_sft", 1e-3),
    "sft": Arm("sft", 2e-3, EACH_ITS_OWN, "solutions of the same 1024 problems"),
}
assert {arm.method for arm in ARMS.values()} == set(METHODS), "every method has an arm"


def main() -> None:
    options = _options()
    arms = [name for name, arm in ARMS.items() if options.only in (None, arm.method, name)]
    if not arms:
        raise UserError(f"--only {options.only}: there is no such method or arm; choose from {', '.join(ARMS)}")
    if options.lrs:
        return _try(arms, options.lrs)
    started = time.monotonic()
    make_models()
    once(_result("reading"), {"models": MODELS}, _reading_results)
    for seed in options.seeds:
        for name in arms:
            recipe = recipe_of(name, seed)
            once(_result(recipe.name), _identity(recipe), arm_results, recipe)
            print(f"{recipe.name}: done, {time.monotonic() - started:.0f} s", flush=True)
    write_page(options.page, ARMS, _results())


def _try(arms: Sequence[str], lrs: Sequence[float]) -> None:
    """Print what other learning rates give."""
    make_models()
    for name in arms:
        for lr in lrs:
            recipe = recipe_of(name, TRIAL_SEED, [f"train.lr={lr}", f"name={name}-lr-{lr:g}"])
            once(_result(recipe.name), _identity(recipe), arm_results, recipe)
            estimate = read(_result(recipe.name))["accuracy"]["avg_at_n"]
            print(f"{name} {lr:g}: {estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]", flush=True)


def make_models() -> None:
    """The student and the teacher, and what they can do without a context."""
    once(_result("models"), {"models": MODELS}, _model_results)


def recipe_of(name: str, seed: int, more: Sequence[str] = ()) -> Recipe:
    """The whole recipe of an arm. Raises UserError for `more` settings that do not fit it."""
    arm, models = ARMS[name], FOLDER / "models"
    own = [f"name={name}-{seed}", f"seed={seed}", f"runs_dir={FOLDER}", f"model.path={models / 'student'}"]
    if "teacher.kind=model" in arm.settings:
        own.append(f"teacher.path={models / 'teacher'}")
    return load_recipe(RECIPE, [*own, f"method.name={arm.method}", f"train.lr={arm.lr}", *arm.settings, *more])


def once(path: Path, identity: Mapping[str, Any], work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Do the work in a process of its own, unless its result is there; keep the result with what it is a result of."""
    if _is_there(path, identity):
        return
    process = multiprocessing.get_context("fork").Process(target=_work, args=(path, identity, work, arguments))
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the worker, which saves and ends
    try:
        process.start()
        process.join()
    finally:
        signal.signal(signal.SIGINT, heard)
    if process.exitcode:
        raise Interrupted(f"{path.stem} ended with status {process.exitcode}; run the same command to go on.")


def _work(path: Path, identity: Mapping[str, Any], work: Callable[..., dict[str, Any]], arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.process_time()
    try:
        result = work(*arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (Interrupted, KeyboardInterrupt):
        sys.exit(130)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"cpu_s": time.process_time() - started, "peak_mib": usage.ru_maxrss / 1024}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"of": identity, **cost, **result}, indent=1))


def _model_results() -> dict[str, Any]:
    shutil.rmtree(FOLDER, ignore_errors=True)  # with other models, all that was made from them is void
    found = {}
    data = f"{WORLD}:train"
    for kind, how in MODELS.items():
        make_model(
            FOLDER / "models" / kind,
            data=data,
            hidden_size=64,
            num_layers=how["num_layers"],
            steps=how["steps"],
            seed=how["seed"],
            limit=how["limit"],
            reads_demonstrations=True,  # of the teacher: to have the student's characters
            console=quiet(),
            problems=None if how["reads"] else lessons(data, num=how["steps"] * BATCH, seed=how["seed"]),
            train_overrides={"lr": how["lr"], "schedule": how["schedule"]},
        )
        found[kind] = {"accuracy": accuracy_of(FOLDER / "models" / kind, recipe_of("grpo", TRIAL_SEED))}
    return found


def accuracy_of(model: Path, recipe: Recipe) -> Accuracy:
    """As the arms are evaluated: the same problems, the same draws."""
    section = recipe.eval
    options = EvaluateOptions(
        model=str(model),
        data=section.sources,
        task=recipe.data.task.text,
        num_samples=section.samples,
        limit=section.limit,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_answer_tokens=recipe.sampling.max_answer_tokens,
        seed=recipe.seed,
        dtype=recipe.model.dtype,
        device=recipe.model.device,
        instruction=recipe.data.instruction,
    )
    (accuracy,) = evaluate_model(options, out=model.with_name(f"{model.name}-evaluation"), console=quiet()).values()
    return accuracy


def _reading_results() -> dict[str, Any]:
    return {"rows": measure_reading(recipe_of("mopd", TRIAL_SEED), recipe_of("opsd", TRIAL_SEED))}


def arm_results(recipe: Recipe) -> dict[str, Any]:
    begun = (recipe.run_dir / "recipe.toml").exists()
    resume = begun and RunFolder(recipe.run_dir).read_recipe() == recipe.as_dict()
    summary = train(recipe, console=quiet(), resume=resume, overwrite=begun and not resume)
    (accuracy,) = summary["eval"]["student_after"].values()
    kept = {key: summary[key] for key in ("tokens", "counts", "warnings", "seconds")}
    return {"accuracy": accuracy, "resumed": resume, **kept}


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe.as_dict(), "models": MODELS}


def _results() -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """(arm, seed, result) of everything that is there and that the recipes of today would give."""
    wanted: list[tuple[str, int | None, Path, dict[str, Any]]] = [
        (name, None, _result(name), {"models": MODELS}) for name in ("models", "reading")
    ]
    for seed in SEEDS:
        for name in ARMS:
            recipe = recipe_of(name, seed)
            wanted.append((name, seed, _result(recipe.name), _identity(recipe)))
    for name, number, path, identity in wanted:
        if _is_there(path, identity):
            yield name, number, read(path)


def _is_there(path: Path, identity: Mapping[str, Any]) -> bool:
    return path.exists() and read(path)["of"] == json.loads(json.dumps(identity))


def _result(name: str) -> Path:
    return FOLDER / "results" / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def quiet() -> Console:
    return Console(file=io.StringIO())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="METHOD", help="the arms of one method, or one arm")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    parser.add_argument("--try", type=float, nargs="+", metavar="LR", dest="lrs", help="print what these give instead")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the first worker is forked; the figures are those of one core
    try:
        main()
    except (UserError, Interrupted) as stop:
        sys.exit(str(stop))
