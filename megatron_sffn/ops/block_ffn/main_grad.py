"""Gradients of tables that are added straight to Megatron's fp32 buffer, `main_grad`.

Megatron's `DistributedDataParallel` gives each parameter a slice of a buffer, `main_grad`, to which
a hook adds `param.grad` when autograd has computed it. A bf16 gradient is then written, read and
added: 12 bytes a number. A product that adds to the buffer itself takes 8, and its sum is never
rounded to bf16. Megatron's linear layers do the same (`gradient_accumulation_fusion`), and the
protocol is theirs: whoever has added to `main_grad` sets `grad_added_to_main_grad`, upon which the
hook drops `param.grad`, a placeholder that only makes the hook run, and in autograd's thread.

The hook would drop a gradient from any other use of the parameter, too. So the owner of a parameter
has to promise, with `add_to_main_grad`, that each use either is `block_ffn` or passes through
`shared`.

Not used, and the gradient takes the usual way, where there is no such buffer (no DDP, Megatron's
FSDP), or it is not in fp32 (bf16 without `--accumulate-allreduce-grads-in-fp32`), in which a sum of
many microbatches would be rounded once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROMISE = "every_use_adds_to_main_grad"
"""Attribute of a parameter: see `add_to_main_grad`."""

PARAMETER = "further_use_of"
"""Attribute of what `further_use` gives: the parameter."""


def add_to_main_grad(table: Tensor) -> None:
    """Promise that every use of a parameter is `block_ffn` or passes through `shared`."""
    setattr(table, PROMISE, True)


def buffer_of(table: Tensor) -> Tensor | None:
    """The buffer, fp32 (fp64 for fp64), that takes a table's gradient; None for the usual way."""
    table = getattr(table, PARAMETER, table)
    wrapped = hasattr(table, "grad_added_to_main_grad") and not hasattr(table, "__fsdp_param__")
    if not wrapped or not getattr(table, PROMISE, False):
        return None
    main_grad: Tensor | None = getattr(table, "main_grad", None)
    wide = torch.promote_types(table.dtype, torch.float32)
    return main_grad if main_grad is not None and main_grad.dtype == wide else None


def placeholder(table: Tensor) -> Tensor | None:
    """What autograd gets for a table whose gradient has been added to its buffer.

    None for a `further_use`: another use gives the one that is needed.

    Marks the table. The hook needs a gradient of the right shape that is not None under
    `--overlap-grad-reduce`. It reads it only where Megatron says so (`zero_out_wgrad`).
    """
    if hasattr(table, PARAMETER):
        return None
    table.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(table, "zero_out_wgrad", False):
        return torch.zeros_like(table, memory_format=torch.contiguous_format)
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def further_use[Table: Tensor | None](table: Table) -> Table:
    """The same table for one more `block_ffn` of a forward, which then makes no placeholder.

    Autograd would add the placeholders up, each as large as the table.
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
        # The oracle's gradient; None of those who add to the buffer.
        return grads[0]


def shared[Table: Tensor | None](table: Table) -> Table:
    """The same table for a use beside `block_ffn`; its gradient joins the other in the buffer."""
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
        # None: autograd adds nothing to the placeholder that `block_ffn` returns.
        return None
