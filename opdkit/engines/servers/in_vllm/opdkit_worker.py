"""What a vLLM worker gains (`--worker-extension-cls opdkit_worker.Worker`): new weights, loaded in place from files.

Read by vLLM's own Python, which may have no opdkit: nothing of opdkit is imported here. The folder of this file is put
on PYTHONPATH.

On a CPU vLLM packs every matrix into the layout of its kernel when the model is built, and a weight that is loaded
later is never packed again: the engine goes on with the old one, or with halves of both. So there the matrices stay
plain. This module is imported before the model is built.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

try:
    from vllm.model_executor.layers import utils
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

    model_runner: Any  # the worker's own

    def opdkit_load(self, folder: str) -> int:
        """Load the safetensors files of a checkpoint, one after another; returns how many weights they hold."""
        count = 0
        for path in sorted(Path(folder).glob("*.safetensors")):
            weights = load_file(path)
            with torch.no_grad():
                self.model_runner.model.load_weights(iter(weights.items()))
            count += len(weights)
        if not count:
            raise FileNotFoundError(f"opdkit_load: there are no weights in {folder}, as this process sees it")
        return count
