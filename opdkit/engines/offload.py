"""What the backward pass needs of the forward pass, kept in host memory in between.

With gradient checkpointing that is one state per layer, which a copy engine moves while the layers compute; without it,
everything that layers keep, which takes longer to move than to compute again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 4096  # numbers; fewer are not worth a copy


def kept_on_host(module: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside the block, what autograd keeps goes to host memory, and comes back when it is asked for. The weights that
    are in the module when the block begins stay where they are."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(kept: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if kept.numel() < SMALL or kept.untyped_storage().data_ptr() in own:
            return kept.detach()
        on_card = kept.device.type == "cuda"
        host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=on_card)
        host.copy_(kept, non_blocking=on_card)
        return kept.device, host

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
