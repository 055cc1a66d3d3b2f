"""What `opdkit plan` says: sums that can be done by hand, refusals, and what shipped recipes say of themselves.
How near it is to measurements: benchmarks/plan_check.py."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.cost import at_hand
from opdkit.cost.changes import changes
from opdkit.cost.devices import GPUS, Device, device_named
from opdkit.cost.plan import Plan, Sizes, plan
from opdkit.cost.size import known_sizes
from opdkit.cost.strategy import is_sharded
from opdkit.cost.work import Lengths
from opdkit.errors import UserError
from opdkit.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
SIZE = "Qwen/Qwen3-1.7B"
P = known_sizes()[SIZE].parameters
CPU = Device(name="cpu", capacity=64 << 30, is_cpu=True)


@pytest.fixture
def run_cli() -> Any:
    """(status, all that was said) of a command; of a UserError the command line makes a sentence and status 2."""

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(words))
        return (2, str(done.exception)) if isinstance(done.exception, UserError) else (done.exit_code, done.output)

    return run


def planned(overrides: tuple[str, ...] = (), **how: Any) -> Plan:
    raw: dict[str, Any] = {
        "name": "r",
        "model": {"path": SIZE},
        "data": {"train": "x.jsonl", "task": "math"},
        "sampling": {"group_size": 8, "max_answer_tokens": 2048},
        "method": {"name": "sdpo"},
        "train": {"steps": 20},
    }
    return plan(parse_recipe(raw, overrides), Sizes(), **how)


def test_bytes_of_a_parameter_by_hand() -> None:
    """Full training under an averaged teacher: 4 weight + 8 AdamW + 4 average, 4 gradient, 2 copy; LoRA: 2 of the base.
    Muon has one moment of the matrices."""
    update = planned().moments["update"]
    assert (update["weights"], update["optimizer"], update["teacher"]) == (4 * P, 8 * P, 4 * P)
    scoring = planned().moments["scoring"]
    assert scoring["bfloat16 copy"] == 2 * P and "gradients" not in scoring
    lora = planned(("model.lora.r=16",)).moments["update"]
    adapters = known_sizes()[SIZE].adapters(16)
    assert lora["weights"] == 2 * P + 4 * adapters and lora["optimizer"] == 8 * adapters
    assert lora["teacher"] == 4 * adapters  # the average is of what is trained
    matrices = known_sizes()[SIZE].matrices
    assert planned(("train.optimizer=muon",)).moments["update"]["optimizer"] == 8 * P - 4 * matrices


def test_ranks_by_hand() -> None:
    """Bytes of a parameter on each of 4: in parts weights 4/4, moments 8/4, an average 4/4; whole copies and gradients,
    of layers in parts those of two of them and of what is outside, and gradients in parts."""
    update = planned(ranks=4).moments["update"]
    assert update["weights"] == 4 / 4 * P
    sharded = planned(("parallel.strategy=sharded",), ranks=4).moments
    layers, size = known_sizes()[SIZE].matrices, known_sizes()[SIZE].layers
    at_once = P - layers + layers * 2 / size
    assert sharded["update"]["weights"] == pytest.approx(4 / 4 * P)
    assert sharded["update"]["gradients"] == pytest.approx(4 * (at_once + layers / 4))
    assert sharded["sampling"]["bfloat16 copy"] == 2 * P
    big = planned(("parallel.strategy=sharded", "parallel.hsdp=2", "parallel.offload=true"), ranks=4)
    assert "weights" not in big.moments["update"] and "optimizer" not in big.moments["update"]
    copies = (P - layers) / 4 + layers / 2
    assert big.in_host_memory["weights and optimizer"] == pytest.approx(12 * copies)
    assert update["optimizer"] == 8 * P / 4 and update["teacher"] == 4 * P / 4
    assert planned(ranks=4).work.rows == planned().work.rows / 4
    assert planned().while_loading == {} and planned(ranks=4).while_loading == {"on each rank": 4 * P}
    for overrides, whole in ((), 4 * P), (("model.lora.r=16",), 2 * P + 4 * known_sizes()[SIZE].adapters(16)):
        found = planned(("parallel.strategy=sharded", *overrides), ranks=4).while_loading
        assert found == {"in each machine's host memory, of one rank after another": whole}


def test_sizes_alone_choose_the_strategy() -> None:
    """With "auto": gathered weights, gradients and parts of 8 ranks are 7.5 bytes a parameter, of an adapter's base 2;
    half of the memory is theirs."""
    full, lora = planned().work.recipe, planned(("model.lora.r=16",)).work.recipe
    for recipe, a_parameter in ((full, 2 + 4 + 12 / 8), (lora, 2)):
        most = int(40e9 / a_parameter)
        assert not is_sharded(recipe, most - 1, 8, 80e9) and is_sharded(recipe, most + 1, 8, 80e9)
        assert not is_sharded(recipe, most + 1, 1, 80e9) and not is_sharded(recipe, most + 1, 8, None)


def test_what_each_setting_moves() -> None:
    """Directions, not sizes: a smaller micro-batch and checkpointing take activations, a model as teacher is there at
    every moment, hidden states wait on the host."""
    base = planned()
    assert base.peak_moment == "update" and base.fits is None and base.seconds is None
    for setting in ("train.max_tokens_per_micro_batch=8192", "model.gradient_checkpointing=true"):
        after = planned((setting,))
        assert after.moments["update"]["activations"] < 0.5 * base.moments["update"]["activations"]
    other = planned(("method.name=opd", "teacher={kind='model', path='Qwen/Qwen3-8B'}"))
    big = known_sizes()["Qwen/Qwen3-8B"]
    assert all(parts["teacher"] == 2 * big.parameters for parts in other.moments.values())
    assert other.in_host_memory == {"hidden states of teachers": other.work.rows * 2048 * big.hidden * 2}


def test_settings_for_little_memory_by_hand() -> None:
    """8-bit moments with a scale for 256 of them; bfloat16 masters, whose gradients are as wide and which need no
    copies; what waits on the host is not on the card, but for the time of its use."""
    assert planned(("train.optimizer=adamw_8bit",)).moments["update"]["optimizer"] == 2 * (1 + 4 / 256) * P
    low = planned(("train.master_dtype=bfloat16",))
    assert low.moments["update"]["weights"] == 2 * P and low.moments["update"]["gradients"] == 2 * P
    assert "bfloat16 copy" not in low.moments["sampling"]
    host = planned(("teacher.weights_on=host",), device=GPUS["h200"])
    assert "teacher" not in host.moments["update"] and host.in_host_memory["weights of teachers"] == 4 * P
    assert host.moments["scoring"]["bfloat16 copy"] == 2 * P
    assert planned(("teacher.weights_on=host",), device=CPU).moments["update"]["teacher"] == 4 * P
    model = ("method.name=opd", "teacher={kind='model', path='Qwen/Qwen3-8B'}")
    big = known_sizes()["Qwen/Qwen3-8B"]
    away = planned((*model, "teacher.placement=cpu"), device=GPUS["h200"])
    assert "teacher" not in away.moments["update"] and away.moments["scoring"]["teacher"] == 2 * big.parameters
    coded = planned((*model, "teacher.quantization=int8"), device=GPUS["h200"]).moments["update"]["teacher"]
    assert coded == 2 * (big.parameters - big.matrices) + (1 + 4 / 256) * big.matrices
    some = planned(("model.gradient_checkpointing=14",)).moments["update"]["activations"]
    none, all_ = planned(), planned(("model.gradient_checkpointing=true",))
    assert all_.moments["update"]["activations"] < some < none.moments["update"]["activations"]
    plain = planned(("model.gradient_checkpointing=true",), device=GPUS["h200"])
    moved = planned(("model.gradient_checkpointing=true", "model.activation_offload=true"), device=GPUS["h200"])
    assert moved.in_host_memory["activations"] > 0 and moved.totals["update"] < plain.totals["update"]


def test_a_gpu_gives_seconds_and_a_capacity_only_bytes() -> None:
    checkpointing = ("model.gradient_checkpointing=true",)
    fast, slow = planned(checkpointing, device=GPUS["h200"]), planned(checkpointing, device=GPUS["l4"])
    assert fast.fits and not slow.fits
    assert fast.seconds and slow.seconds and all(fast.seconds[m] < slow.seconds[m] for m in fast.seconds)
    assert 0.2 < (fast.mfu or 0) < 0.6
    plain = planned(device=device_named("24GB"))
    assert plain.fits is False and plain.seconds is None


def test_changes_are_settings_that_exist_and_save() -> None:
    """Each one's peak is that of a plan of the changed recipe; those that change what is learned come last."""
    before = planned(device=GPUS["a100-80"])
    found = changes(before, Sizes(), Lengths())
    assert [c.learns_otherwise for c in found] == sorted(c.learns_otherwise for c in found)
    one = next(c for c in found if c.settings == {"model.gradient_checkpointing": True})
    assert one.after.peak == planned(("model.gradient_checkpointing=true",), device=GPUS["a100-80"]).peak < before.peak
    assert one.after.seconds and before.seconds and one.after.seconds["update"] > before.seconds["update"]


def test_refusals(run_cli: Any, tmp_path: Path) -> None:
    """What cannot be known is said, with the way out."""
    recipe = str(ROOT / "recipes" / "gsm8k_tiny.toml")
    status, said = run_cli("plan", recipe)
    assert status == 2 and "model.path = models/gsm8k-tiny: its size is not known" in said and "--config" in said
    status, said = run_cli("plan", recipe, "--config", SIZE, "--gpu", "rtx4900")
    assert status == 2 and "did you mean rtx4090?" in said and "a100-80" in said
    status, said = run_cli("plan", recipe, "--config", "teacher=x")
    assert status == 2 and "write --config FILE" in said
    status, said = run_cli("plan", recipe, "--config", f"model.path={SIZE}", "--json", "--gpu", "24GB")
    known = json.loads(said)
    assert status == 0 and known["fits"] is False and known["estimate"] is True and known["seconds"] is None
    other = ("method.name=opd", "teacher={kind='model', path='x/y'}")
    with pytest.raises(UserError, match=r"teacher\.path = x/y: its size is not known"):
        planned(other)


def test_a_local_folder_needs_its_config_alone(tmp_path: Path) -> None:
    """No weight file is there, and an adapter's folder names its base."""
    from transformers import LlamaConfig

    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**tiny, num_key_value_heads=1, vocab_size=99).save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    sizes = Sizes()
    assert sizes("model.path", str(adapter), None, False).hidden == 32


def test_what_torch_modules_hold_is_what_the_plan_says() -> None:
    """The numbers that are written here a second time, because theirs are beside torch."""
    from opdkit.cost import memory, work
    from opdkit.engines import memory as engines_memory
    from opdkit.engines.sampling import slots
    from opdkit.losses import head

    assert work.TOKENS_PER_BATCH == engines_memory.TOKENS_PER_BATCH
    assert memory.CACHE_SHARE == engines_memory.CACHE_SHARE
    assert memory.LOGIT_BYTES == slots.LOGIT_BYTES
    for name in ("CHUNK_BYTES", "CHUNK_OF_WEIGHTS", "BLOCK_BYTES"):
        assert getattr(memory, name) == getattr(head, name)


def test_check_says_that_a_recipe_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: Any) -> None:
    """On a GPU that is too small it is told what would help, on a machine without one its memory counts; what fits, or
    has a model of unknown size, is not spoken of."""
    recipe = tmp_path / "r.toml"
    path, lengths = f'[model]\npath = "{SIZE}"\n', "[sampling]\nmax_answer_tokens = 512\n"
    rest = f'[data]\ntrain = "x.jsonl"\ntask = "math"\n[method]\nname = "grpo"\n[train]\nsteps = 1\n{lengths}'
    recipe.write_text(f'name = "r"\n{path}{rest}', encoding="utf-8")
    for gpus, machine, said in (
        ([180 << 30, 80 << 30], 1 << 50, "has 75.8; it would with model.gradient_checkpointing = true;"),
        ([180 << 30], 1 << 10, None),
        ([], 8 << 30, "this machine, without a GPU, has 8.0; `opdkit plan`"),
        ([], 1 << 50, None),
    ):
        monkeypatch.setattr(at_hand, "_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(at_hand, "machine_bytes", lambda machine=machine: machine)
        output = " ".join(run_cli("check", str(recipe))[1].split())
        assert ("it does not fit" in output) == (said is not None), output
        assert said is None or said in output, output
    monkeypatch.setattr(at_hand, "machine_bytes", lambda: 1)
    recipe.write_text(f'name = "r"\n[model]\npath = "nobody/knows"\n{rest}', encoding="utf-8")
    assert "it does not fit" not in run_cli("check", str(recipe))[1]


def test_recipes_say_which_gpus_they_fit() -> None:
    """Each that names real models; wrong lines: python benchmarks/plan_fits.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan_fits
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    said = {}
    for path in sorted((ROOT / "recipes").rglob("*.toml")):
        line = plan_fits.fits_line(path)
        said[path] = line
        assert plan_fits.LINE.findall(path.read_text(encoding="utf-8")) == ([] if line is None else [line]), path
    assert sum(line is not None for line in said.values()) >= 40
