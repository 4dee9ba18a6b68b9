"""What torch really keeps for the backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that a call's autograd graph saves, each once.

    Among them is what `block_ffn` derives from its pairs and keeps beside the saved tensors.

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
    for tensor in _derived(output.grad_fn):
        pack(tensor)
    size = sum(
        tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in weights
    )
    del output
    return size


def _derived(root: Any) -> Iterator[Tensor]:
    """Tensors in `Sorted.derived` of all nodes of a graph."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        for record in getattr(node, "derived", {}).values():
            yield from _tensors(record)
        following = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= following
        waiting += following


def _tensors(record: Any) -> Iterator[Tensor]:
    """Those in records of tensors, records and lists of records."""
    if isinstance(record, Tensor):
        yield record
    elif dataclasses.is_dataclass(record):
        for item in dataclasses.fields(record):
            yield from _tensors(getattr(record, item.name))
    elif isinstance(record, list):
        for item in record:
            yield from _tensors(item)
