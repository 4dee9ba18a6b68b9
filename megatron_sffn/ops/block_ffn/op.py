"""`block_ffn`: check the arguments, take the backend of `choose_backend.py`, compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.activation import Activation, AnyActivation
from megatron_sffn.ops.block_ffn import autograd, check, cpu, naive, torch_backend
from megatron_sffn.ops.block_ffn.choose_backend import products_for, resolve
from megatron_sffn.ops.block_ffn.pairs import Pairs, pairs_of_ids


def block_ffn(
    x: Tensor,
    keys: Tensor | None,
    values: Tensor,
    block_ids: Tensor,
    gates: Tensor | None = None,
    *,
    activation: AnyActivation | str = Activation.GELU,
    backend: str = "auto",
) -> Tensor:
    """`y_t = Σ_k gates_tk · f(x_t K_iᵀ) V_i` with `i = block_ids_tk`.

    Args:
        x: `[T, C]` float64, float32, bfloat16 or float16. C is the width of the keys: the model's
            D, unless the keys are of low rank.
        keys: `[B, G, C]`, of x's dtype; `[B, 2G, C]` with the gate keys first if gated. None
            if there are values alone, whose coefficients are the gates.
        values: `[B, G, D]`, of x's dtype.
        block_ids: `[T, K]` integers in [0, B), distinct within a row; negative for no block.
        gates: `[T, K]` factors of the blocks' outputs, or None for 1.
        activation: `gelu`, `relu`, `squared_relu`, `swiglu` or `quick_geglu`; or a
            `ClampedActivation` of one of the last two.
        backend: `naive`, the oracle; `torch`, a loop over blocks; `grouped`, a grouped product;
            `masked`, all rows times all cells; `bags`, for single cells; `quack`, a grouped
            product of the package quack-kernels; `cpu`, C++; `triton`, for a GPU and 32 or 16
            bits; or `auto` for the fastest on x's device.

    Returns:
        `[T, D]` of x's dtype, differentiable in x, keys, values and gates. Sums are in fp32 at
        least.

    Raises:
        ConfigError: if a shape, dtype, device or name does not fit; with `SFFN_CHECK=1` also if an
            id is out of range or twice in a row.
    """
    check.ids(x, block_ids, gates)
    pairs, gates = pairs_of_ids(block_ids, gates, may_be_empty=True)
    return block_ffn_pairs(x, keys, values, pairs, gates, activation=activation, backend=backend)


def block_ffn_pairs(
    x: Tensor,
    keys: Tensor | None,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None = None,
    *,
    activation: AnyActivation | str = Activation.GELU,
    backend: str = "auto",
    rows_again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`block_ffn` for rows that each have any number of blocks, as they arrive on a rank.

    Args:
        x: `[R, C]`.
        keys: `[B, G, C]`, `[B, 2G, C]` or None, as in `block_ffn`.
        values: `[B, G, D]`.
        pairs: the (row, block) pairs to compute.
        gates: `[P]` in the order of `pairs`, or None.
        activation: as in `block_ffn`.
        backend: as in `block_ffn`.
        rows_again: returns x again in the backward pass, so that x is not kept; None to keep it.
            The oracle keeps it in any case.

    Returns:
        `[R, D]`; zero for a row without a block.

    Raises:
        ConfigError: as in `block_ffn`.
    """
    activation = check.activation(activation)
    check.tensors(x, keys, values, pairs, gates, activation)
    check.pairs(pairs, len(x), len(values), distinct=keys is not None)
    products = products_for(resolve(backend, x, keys, values, pairs), values)
    if keys is None:
        assert gates is not None  # as checked
        if products is None:
            return naive.weighted_values(len(x), values, pairs, gates)
        return autograd.weighted_values(len(x), values, pairs, gates, products)
    if products is None:
        return naive.block_ffn(x, keys, values, pairs, gates, activation)
    return autograd.block_ffn(x, keys, values, pairs, gates, activation, products, rows_again)


def sort_stably(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Sort small integers, stably.

    Args:
        keys: `[P]` int32 in [0, num_keys).
        num_keys: N.

    Returns:
        The order `[P]` int32, and `[N + 1]` int64: where each key begins in it.
    """
    products = torch_backend if device.is_gpu(keys) else cpu.products(torch.float32, cells=1)
    return products.sort(keys, num_keys)
