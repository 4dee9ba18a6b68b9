"""Bytes that torch keeps for the backward pass, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that a call's autograd graph saves, each once.

    They include what `block_ffn` derives from its pairs and keeps beside the saved tensors.

    Args:
        function: makes the graph.
        parameters: weights, whose storages do not count.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # The tensors are held, so that no storage is freed and given to another tensor.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    for tensor in _derived(output.grad_fn):
        pack(tensor)
    size = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in saved.items()
        if pointer not in weights
    )
    del output
    return size


def _derived(root: Any) -> Iterator[Tensor]:
    """The tensors in `Sorted.derived` of all nodes of a graph."""
    pending, visited = [root], {root}
    while pending:
        node = pending.pop()
        for record in getattr(node, "derived", {}).values():
            yield from _tensors(record)
        parents = {parent for parent, _ in node.next_functions if parent is not None} - visited
        visited |= parents
        pending += parents


def _tensors(record: Any) -> Iterator[Tensor]:
    """The tensors in a record, in its records, and in its lists."""
    if isinstance(record, Tensor):
        yield record
    elif dataclasses.is_dataclass(record):
        for item in dataclasses.fields(record):
            yield from _tensors(getattr(record, item.name))
    elif isinstance(record, list):
        for item in record:
            yield from _tensors(item)
