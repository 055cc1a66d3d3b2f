"""What a vLLM worker gains (`--worker-extension-cls opdkit_worker.Worker`): new weights, loaded in place, from files or
out of the trainer's own memory on the same GPU.

Read by vLLM's own Python, which may have no opdkit: nothing of opdkit is imported here. The folder of this file is put
on PYTHONPATH. Weights go through vLLM's own way of loading a running model anew, layer by layer, as its transfer
engines do. Their interface for CUDA IPC takes handles as a pickle, which whoever reaches the port could write; here
they are JSON.

On a CPU vLLM packs every matrix into the layout of its kernel when the model is built, and a weight that is loaded
later is never packed again: the engine goes on with the old one, or with halves of both. So there the matrices stay
plain. This module is imported before the model is built.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import rebuild_cuda_tensor

try:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import utils
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _packing = utils.dispatch_cpu_unquantized_gemm

        def _plain(layer: Any, remove_weight: bool) -> Any:
            if layer.weight.is_meta or layer.weight.ndim != 2:
                return _packing(layer, remove_weight)
            layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)

        utils.dispatch_cpu_unquantized_gemm = _plain
except ImportError as error:
    raise ImportError(
        f"opdkit does not know the inside of this vLLM ({error}); use a version it was tested with"
    ) from None


class Worker:
    """Methods that the worker gains; `/collective_rpc` calls them by name."""

    model_runner: Any  # the worker's own, like the next two
    vllm_config: Any
    device: torch.device

    def opdkit_load(self, folder: str) -> int:
        """Load the safetensors files of a checkpoint, one after another; returns how many weights they hold."""
        paths = sorted(Path(folder).glob("*.safetensors"))
        count = self._load(load_file(path) for path in paths)
        if not count:
            raise FileNotFoundError(f"opdkit_load: there are no weights in {folder}, as this process sees it")
        return count

    def opdkit_device(self) -> str:
        """Which GPU holds this worker, by the number it was made with; "" without one."""
        return gpu_name(self.device)

    def opdkit_load_shared(self, layout: str) -> int:
        """Load the weights that `opdkit.engines.servers.gpu_memory.layout_of` describes; returns how many."""
        weights = {name: rebuilt(entry, self.device) for name, entry in json.loads(layout).items()}
        count = self._load([weights])
        weights.clear()
        torch.cuda.synchronize(self.device)  # the trainer may go on with its memory
        torch.cuda.ipc_collect()
        return count

    def _load(self, parts: Iterable[dict[str, torch.Tensor]]) -> int:
        count, model = 0, self.model_runner.model
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            for part in parts:
                model.load_weights(iter(part.items()))
                count += len(part)
            finalize_layerwise_reload(model, self.model_runner.model_config)
        return count


def gpu_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def rebuilt(entry: dict[str, Any], device: torch.device) -> torch.Tensor:
    """A tensor in another process's memory on this GPU: CUDA's handles of its allocation, and where it lies in it."""
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(entry["shape"]),
        tuple(entry["stride"]),
        entry["offset"],
        torch.UntypedStorage,
        {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[entry["dtype"]],
        device.index,
        bytes.fromhex(entry["handle"]),
        entry["storage_bytes"],
        entry["storage_offset"],
        False,
        bytes.fromhex(entry["counter"]),
        entry["counter_offset"],
        bytes.fromhex(entry["event"]),
        entry["event_sync"],
    )
