"""What a vLLM worker gains (`--worker-extension-cls opdkit_worker.Worker`): new weights, loaded in place from a file.

Read by vLLM's own Python, which may have no opdkit: nothing of opdkit is imported here. The folder of this file is put
on PYTHONPATH.

On a CPU vLLM packs every matrix into the layout of its kernel when the model is built, and a weight that is loaded
later is never packed again: the engine goes on with the old one, or with halves of both. So there the matrices stay
plain. This module is imported before the model is built.
"""

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

    def opdkit_load(self, path: str) -> list[int]:
        """Load a safetensors file of a checkpoint's names; returns how many parameters vLLM filled."""
        weights = load_file(path)
        with torch.no_grad():
            filled = self.model_runner.model.load_weights(iter(weights.items()))
        return [len(weights), -1 if filled is None else len(filled)]
