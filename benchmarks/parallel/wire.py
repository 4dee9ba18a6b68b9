"""Counts the bytes that collectives send, in our layer and in Megatron's.

Design notes: the functions of `torch.distributed` are replaced by ones that count and then call the
original. So Megatron's layer, which reports nothing, is counted like ours; a collective that is not
counted stops the run. The count is the minimum of an operation, as in `nn/comm_volume.py`; gloo's
reduce-scatter is implemented as an all-reduce and sends twice as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor


@dataclass
class Sent:
    """Bytes that this rank has sent to other ranks."""

    total: int = 0


def _all_to_all(input: Tensor, group: Any, splits: Any) -> int:
    ranks = group.size()
    sizes = [len(input) // ranks] * ranks if splits is None else [int(size) for size in splits]
    row = input[:1].nbytes
    return (sum(sizes) - sizes[group.rank()]) * row


def _all_gather(input: Tensor, group: Any, splits: Any) -> int:
    return int((group.size() - 1) * input.nbytes)


def _reduce_scatter(input: Tensor, group: Any, splits: Any) -> int:
    return int((group.size() - 1) * (input.nbytes // group.size()))


# Megatron's mappings have imported two of the functions under other names.
_COUNTED: tuple[tuple[Any, str, Callable[[Tensor, Any, Any], int]], ...] = (
    (torch.distributed, "all_to_all_single", _all_to_all),
    (torch.distributed, "all_gather_into_tensor", _all_gather),
    (torch.distributed, "reduce_scatter_tensor", _reduce_scatter),
    (mappings, "dist_all_gather_func", _all_gather),
    (mappings, "dist_reduce_scatter_func", _reduce_scatter),
)
_UNCOUNTED = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce", "reduce_scatter")


@contextmanager
def counted() -> Iterator[Sent]:
    """Count the bytes that this process sends through collectives inside the `with` block."""
    sent = Sent()

    def counting(original: Callable[..., Any], size: Callable[[Tensor, Any, Any], int]) -> Any:
        def call(output: Tensor, input: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
            sent.total += size(input, group, kwargs.get("input_split_sizes"))
            return original(output, input, *args, group=group, **kwargs)

        return call

    def uncounted(name: str) -> Callable[..., NoReturn]:
        def call(*args: Any, **kwargs: Any) -> NoReturn:
            raise AssertionError(f"torch.distributed.{name} sends bytes that are not counted")

        return call

    with ExitStack() as stack:
        for owner, name, size in _COUNTED:
            replacement = counting(getattr(owner, name), size)
            stack.enter_context(patch.object(owner, name, replacement))
        for name in _UNCOUNTED:
            stack.enter_context(patch.object(torch.distributed, name, uncounted(name)))
        yield sent
