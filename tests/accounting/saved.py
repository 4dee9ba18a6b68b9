"""What torch really keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that a call's autograd graph saves, each once.

    Args:
        function: makes the graph.
        parameters: whose storages do not count.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # Tensors, too: a storage that is freed could be given to another tensor.
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    size = sum(
        tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in weights
    )
    del output
    return size
