"""Accumulate the gradients of tables directly in Megatron's fp32 gradient buffer, `main_grad`.

Megatron's `DistributedDataParallel` gives each parameter a slice of a buffer, `main_grad`, to which
a hook adds `param.grad` after autograd has computed it. A bf16 gradient is then written, read and
added: 12 bytes per number. A product that adds to the buffer itself takes 8, and its sum is never
rounded to bf16. Megatron's linear layers do the same (`gradient_accumulation_fusion`), and this
module follows their protocol: code that has added to `main_grad` sets `grad_added_to_main_grad`,
and the hook then drops `param.grad`. Autograd still needs a placeholder gradient, so that it runs
the hook.

The hook would also drop a gradient from any other use of the parameter. So the owner of a parameter
promises, with `add_to_main_grad`, that each use either is `block_ffn` or passes through `shared`.

Gradients take the usual way through `param.grad` if there is no such buffer (no DDP, Megatron's
FSDP) or if it is not in fp32 (bf16 without `--accumulate-allreduce-grads-in-fp32`), because a bf16
sum over many microbatches would be rounded once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROMISE = "every_use_adds_to_main_grad"
"""Name of the attribute that `add_to_main_grad` sets on a parameter."""

PARAMETER = "further_use_of"
"""Name of the attribute with the parameter, on a view that `further_use` returns."""


def add_to_main_grad(table: Tensor) -> None:
    """Promise that every use of a parameter is `block_ffn` or passes through `shared`."""
    setattr(table, PROMISE, True)


def buffer_of(table: Tensor) -> Tensor | None:
    """The fp32 (fp64 for fp64) buffer for a table's gradient; None to use `param.grad`."""
    table = getattr(table, PARAMETER, table)
    wrapped = hasattr(table, "grad_added_to_main_grad") and not hasattr(table, "__fsdp_param__")
    if not wrapped or not getattr(table, PROMISE, False):
        return None
    main_grad: Tensor | None = getattr(table, "main_grad", None)
    wide = torch.promote_types(table.dtype, torch.float32)
    return main_grad if main_grad is not None and main_grad.dtype == wide else None


def placeholder(table: Tensor) -> Tensor | None:
    """The gradient to return to autograd for a table whose gradient is already in its buffer.

    Sets `grad_added_to_main_grad` on the table. Under `--overlap-grad-reduce` Megatron's hook needs
    a gradient of the right shape, but it reads the numbers only if `zero_out_wgrad` is set. Returns
    None for a view of `further_use`, because the first use returns the placeholder.
    """
    if hasattr(table, PARAMETER):
        return None
    table.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(table, "zero_out_wgrad", False):
        return torch.zeros_like(table, memory_format=torch.contiguous_format)
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def further_use[Table: Tensor | None](table: Table) -> Table:
    """The same table for one more `block_ffn` in a forward pass, without a second placeholder.

    Autograd would otherwise add up placeholders, each as large as the table.
    """
    if table is None or buffer_of(table) is None:
        return table
    view: Any = _FurtherUse.apply(table)
    setattr(view, PARAMETER, table)
    return view


class _FurtherUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        # A gradient from the oracle; None from a backend that has added to the buffer.
        return grads[0]


def shared[Table: Tensor | None](table: Table) -> Table:
    """The same table for a use other than `block_ffn`; its gradient is added to the buffer too."""
    if table is None or not getattr(table, PROMISE, False):
        return table
    view: Any = _Shared.apply(table)
    return view


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.table = table
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        (grad,) = grads
        main_grad = buffer_of(ctx.table)
        if main_grad is None:
            return grad
        main_grad.add_(grad)
        # None, so that autograd adds nothing to the placeholder that `block_ffn` returns.
        return None
