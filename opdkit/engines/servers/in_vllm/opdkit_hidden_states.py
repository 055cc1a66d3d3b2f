"""vLLM's connector of hidden states for its CPU build: `"kv_connector": "CPUHiddenStates"`, this module beside it.

Read by vLLM's own Python, which may have no opdkit: nothing of opdkit is imported here. The folder of this file is put
on PYTHONPATH. On a GPU the stock `ExampleHiddenStatesConnector` does the same; on a CPU its way through pinned memory
and CUDA streams ends the engine, so here the states are written at once.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        ExampleHiddenStatesConnector,
        extract_from_kv_cache,
    )
except ImportError as error:
    raise ImportError(
        f"opdkit does not know the inside of this vLLM ({error}); use a version it was tested with"
    ) from None


class _Done:
    """A write that is over: what the connector asks of a CUDA event."""

    def query(self) -> bool:
        return True


class CPUHiddenStates(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: Any) -> None:
        size = self._block_size
        slots = (torch.tensor(pending.block_ids)[:, None] * size + torch.arange(size)).flatten()
        hidden = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        lock = self._lock_fds.pop(pending.req_id, None)
        try:
            save_file({"hidden_states": hidden, "token_ids": pending.token_ids.clone()}, pending.filename)
        finally:
            if lock is not None:
                os.close(lock)
        self._req_copy_events[pending.req_id] = _Done()
