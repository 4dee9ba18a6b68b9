"""`block_ffn`: the functional form of a sparse feed-forward layer, and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import backends, device
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import (
    autograd,
    bags,
    check,
    choice,
    cpu,
    grouped,
    masked,
    naive,
    quack,
    torch_backend,
)
from megatron_sffn.ops.block_ffn.autograd import Products
from megatron_sffn.ops.block_ffn.pairs import Pairs, pairs_of_ids
from megatron_sffn.utils.errors import ConfigError


def block_ffn(
    x: Tensor,
    keys: Tensor | None,
    values: Tensor,
    block_ids: Tensor,
    gates: Tensor | None = None,
    *,
    activation: Activation | str = Activation.GELU,
    backend: str = "auto",
) -> Tensor:
    """`y_t = Σ_k gates_tk · f(x_t K_iᵀ) V_i` with `i = block_ids_tk`.

    Args:
        x: `[T, C]` float64, float32, bfloat16 or float16, of the keys' width C; the model's D
            unless the keys are of low rank.
        keys: `[B, G, C]`, of x's dtype; `[B, 2G, C]` with the gate keys first for `swiglu`. None
            for a memory of values alone, whose coefficients are the gates.
        values: `[B, G, D]`, of x's dtype.
        block_ids: `[T, K]` integers in [0, B), distinct within a row; negative for no block.
        gates: `[T, K]` factors of the blocks' outputs, or None for 1.
        activation: `gelu`, `relu`, `squared_relu` or `swiglu`.
        backend: `naive`, the oracle; `torch`, a loop over blocks; `grouped`, a grouped product;
            `masked`, all rows times all cells; `bags`, for single cells; `quack`, a grouped
            product of the package quack-kernels; `cpu`, C++; `triton`, for a GPU and 32 or 16
            bits; or `auto` for the fastest on x's device.

    Returns:
        `[T, D]` of x's dtype, differentiable in x, keys, values and gates. Sums are in fp32 at
        least.

    Raises:
        ConfigError: if a shape, dtype, device or name does not fit; where `SFFN_CHECK=1` is set,
            also if an id is out of range or twice in a row.
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
    activation: Activation | str = Activation.GELU,
    backend: str = "auto",
    rows_again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`block_ffn` for rows with any number of blocks, as they arrive on a rank.

    Args:
        x: `[R, C]`.
        keys: `[B, G, C]`, `[B, 2G, C]` or None, as in `block_ffn`.
        values: `[B, G, D]`.
        pairs: which row meets which block.
        gates: `[P]` in the order of `pairs`, or None.
        activation: as in `block_ffn`.
        backend: as in `block_ffn`.
        rows_again: gives x once more in the backward, so that it is not kept; None to keep it. The
            oracle keeps it in any case.

    Returns:
        `[R, D]`; zero for a row without a block.

    Raises:
        ConfigError: as in `block_ffn`.
    """
    activation = check.activation(activation)
    check.tensors(x, keys, values, pairs, gates, activation)
    check.pairs(pairs, len(x), len(values), distinct=keys is not None)
    products = _products(_resolved(backend, x, keys, values, pairs), values)
    if keys is None:
        assert gates is not None  # as checked
        if products is None:
            return naive.weighted_values(len(x), values, pairs, gates)
        return autograd.weighted_values(len(x), values, pairs, gates, products)
    if products is None:
        return naive.block_ffn(x, keys, values, pairs, gates, activation)
    return autograd.block_ffn(x, keys, values, pairs, gates, activation, products, rows_again)


def sort_stably(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Sort small integers.

    Args:
        keys: `[P]` int32 in [0, num_keys).
        num_keys: N.

    Returns:
        Their stable order `[P]` int32, and `[N + 1]` int64: where in it each key begins.
    """
    products = torch_backend if device.is_gpu(keys) else cpu.products(torch.float32, cells=1)
    return products.sort(keys, num_keys)


def _resolved(backend: str, x: Tensor, keys: Tensor | None, values: Tensor, pairs: Pairs) -> str:
    """The backend of a call: on a GPU what `auto` stands for.

    Raises:
        ConfigError: if one of `choice.NEED_SHAPES` was asked for and cannot compute the call.
    """
    if backend not in choice.NEED_SHAPES and not (backend == "auto" and device.is_gpu(values)):
        return backend
    shape = choice.Shape(
        rows=len(x),
        pairs=len(pairs.rows),
        blocks=len(values),
        cells=values.shape[1],
        width=values.shape[2],
        key_width=0 if keys is None else keys.shape[2],
    )
    if backend == "auto":
        return choice.backend_of(shape, values)
    if (why_not := choice.refusal(backend, shape, values)) is not None:
        raise ConfigError(f"backend {backend} {why_not}; use auto, masked or torch")
    return backend


def _products(backend: str, values: Tensor) -> Products | None:
    """Who multiplies; None for the oracle, which has no parts."""
    backends.check(backend, values)
    match backend:
        case "naive":
            return None
        case "triton":
            kernels: Products = backends.triton_for(_triton, values)
            return kernels
        case "torch":
            return torch_backend
        case "grouped":
            return grouped
        case "quack":
            quack.kernels()
            return quack
        case "masked":
            return masked
        case "bags":
            return bags
        case _:
            return cpu.products(values.dtype, values.shape[1])


def _triton() -> Any:
    """The Triton products, whose import needs the package triton."""
    from megatron_sffn.ops.block_ffn import triton

    return triton
