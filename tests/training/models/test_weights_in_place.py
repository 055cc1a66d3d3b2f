"""An engine on the trainer's GPU reads the weights out of its memory. There is no GPU here: CUDA's two functions are
replaced by ones that hand tensors over in this process; everything between them is what runs on a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from opdkit.engines.model import LanguageModel
from opdkit.engines.servers import gpu_memory
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.recipe.sections import TrainSection
from opdkit.training.loop import train
from opdkit.training.models import student_server
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.student_server import StudentServer, checkpoint_state, write_weights

sys.path.append(str(Path(__file__).parents[2] / "engines" / "servers"))
from fake_server import FakeServer

WORKER = Path(student_server.__file__).parents[2] / "engines/servers/in_vllm/opdkit_worker.py"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that a vLLM worker imports, in front of a vLLM of five names."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"set_current_vllm_config": lambda config: nullcontext()},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {"utils": SimpleNamespace()},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: model.begun.append(True),
            "finalize_layerwise_reload": lambda model, config: model.ended.append(config),
        },
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
    }
    for name, has in names.items():
        module = ModuleType(name)
        vars(module).update(has)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("opdkit_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared(worker: Any, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, torch.Tensor]:
    """Tensors by the handle that stands for them."""
    tensors: dict[bytes, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> Any:
        handle = len(tensors).to_bytes(64, "big")
        tensors[handle] = tensor
        form = (torch.Tensor, tensor.size(), tensor.stride(), tensor.storage_offset(), torch.UntypedStorage)
        memory = (tensor.dtype, 0, handle, tensor.untyped_storage().nbytes(), 512, False)
        return None, (*form, *memory, b"counter", 7, b"event", True)

    def rebuild(*args: Any) -> torch.Tensor:
        cls, size, stride, offset, _, dtype, device, handle, num_bytes, start, grad, counter, at, event, sync = args
        tensor = tensors[handle]
        assert (cls, device, start, grad, counter, at, event, sync) == (
            torch.Tensor, 0, 512, False, b"counter", 7, b"event", True
        )  # fmt: skip
        assert (size, stride, offset, dtype) == (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        assert num_bytes == tensor.untyped_storage().nbytes()
        return tensor.clone()

    monkeypatch.setattr(gpu_memory, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(worker, "rebuild_cuda_tensor", rebuild)
    for name in ("synchronize", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    return tensors


@pytest.fixture
def server(models: dict[str, Path], worker: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """One whose worker says that it is on the trainer's GPU."""
    with FakeServer(models["student"]) as fake:
        one = worker.Worker()
        one.device, one.vllm_config = torch.device("cuda:0"), None
        monkeypatch.setattr(worker, "gpu_name", lambda device: "GPU-7")
        monkeypatch.setattr(student_server, "gpu_name", lambda device: "GPU-7")

        def load_weights(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
            import copy

            module = copy.deepcopy(fake._base)
            module.load_state_dict(dict(weights), strict=False)
            fake._base = module

        model = SimpleNamespace(load_weights=load_weights, begun=[], ended=[])
        one.model_runner = SimpleNamespace(model=model, model_config="config")
        fake.worker = one
        opened = StudentServer.open

        def open_as_own(self: StudentServer, waiting: Any) -> None:
            opened(self, waiting)
            self.served.process = SimpleNamespace(is_running=True, stop=lambda: None)  # type: ignore[assignment]

        monkeypatch.setattr(StudentServer, "open", open_as_own)
        yield fake


def served(recipe: Callable[..., Recipe], server: FakeServer, *overrides: str) -> Recipe:
    own = ("sampling.engine=server", f"sampling.url={server.url}", "train.steps=3", "train.lr=0.01")
    return recipe("opd", *own, "sampling.max_answer_tokens=8", *overrides)


@pytest.mark.parametrize(("overrides", "most"), [((), 1e-3), (("model.dtype=bfloat16",), 0.5)])
def test_every_update_arrives_without_a_file(
    recipe: Callable[..., Recipe],
    server: FakeServer,
    shared: dict[bytes, torch.Tensor],
    console: Console,
    overrides: tuple[str, ...],
    most: float,
) -> None:
    run = served(recipe, server, *overrides)
    train(run, console=console)
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["rollout/probe_gap_p999"] for line in lines if "train/loss" in line]
    assert len(gaps) == 3 and max(gaps) < most
    asked = [body["method"] for body in server.asked("/collective_rpc")]
    assert asked == ["opdkit_device", "opdkit_load_shared"] * 3
    model = server.worker.model_runner.model
    assert model.begun == [True] * 3 and model.ended == ["config"] * 3
    assert {tensor.dtype for tensor in shared.values()} == {torch.bfloat16 if overrides else torch.float32}
    assert not list((run.run_dir / "sampler").glob("*"))


@pytest.mark.parametrize("overrides", [("sampling.lag=1",), ("model.lora={r=4, alpha=8}",)])
def test_weights_that_change_meanwhile_and_adapters_come_as_files(
    recipe: Callable[..., Recipe], server: FakeServer, console: Console, overrides: tuple[str, ...], shared: Any
) -> None:
    train(served(recipe, server, *overrides), console=console)
    assert not shared


def test_an_engine_on_another_gpu_gets_files(
    recipe: Callable[..., Recipe],
    server: FakeServer,
    worker: Any,
    console: Console,
    shared: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "gpu_name", lambda device: "GPU-8")
    train(served(recipe, server), console=console)
    assert not shared and [body["method"] for body in server.asked("/collective_rpc")][:2] == [
        "opdkit_device",
        "opdkit_load",
    ]


def test_memory_that_cannot_be_shared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: torch.Tensor) -> Any:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(gpu_memory, "reduce_tensor", fails)
    with pytest.raises(UserError, match="expandable_segments"):
        gpu_memory.layout_of({"a": torch.zeros(2)})


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_names_and_numbers_are_those_of_a_checkpoint(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """What would be written is what is shared; transformers may hold experts in another form than checkpoints do."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    form: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "tie_word_embeddings": kind == "tied",
        "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "experts":
        config = Qwen3MoeConfig(**form, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    else:
        Qwen3ForCausalLM(Qwen3Config(**form)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    student = LanguageModel.load(tmp_path / "model", dtype=torch.float32, device="cpu")
    optimizer = Optimizer(student.module, TrainSection(steps=1), compute_dtype=torch.bfloat16)
    write_weights(student, optimizer.compute_weights(), optimizer.compute_dtype, tmp_path / "written")
    with student.using(optimizer.compute_weights()):
        state = checkpoint_state(student, optimizer)
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) and written[name].dtype == torch.bfloat16 for name in state)
