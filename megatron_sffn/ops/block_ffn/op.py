"""`block_ffn`: the functional form of a sparse feed-forward layer, and the choice of backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_sffn.errors import ConfigError
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import check, cpu, function, loop, naive
from megatron_sffn.ops.block_ffn.function import Products
from megatron_sffn.ops.block_ffn.pairs import Pairs, pairs_of_ids

BACKENDS = ("auto", "naive", "torch", "cpu", "triton")


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
        backend: `naive`, the oracle; `torch`, a loop over blocks; `cpu`, C++; `triton`, for a GPU
            and 32 or 16 bits; or `auto` for the fastest on x's device.

    Returns:
        `[T, D]` of x's dtype, differentiable in x, keys, values and gates. Sums are in fp32 at
        least.

    Raises:
        ConfigError: if a shape, dtype, device or name does not fit; where `SFFN_CHECK=1` is set,
            also if an id is out of range or twice in a row.
    """
    check.ids(x, block_ids, gates)
    pairs, gates = pairs_of_ids(block_ids, gates)
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

    Returns:
        `[R, D]`; zero for a row without a block.

    Raises:
        ConfigError: as in `block_ffn`.
    """
    try:
        activation = Activation(activation)
        if backend not in BACKENDS:
            raise KeyError(str(backend))
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{error} is not a block_ffn activation ({', '.join(Activation)}) or backend "
            f"({', '.join(BACKENDS)}); choose one of these"
        ) from None
    check.tensors(x, keys, values, pairs, gates, activation)
    check.pairs(pairs, len(x), len(values), distinct=keys is not None)
    products = _products(backend, values)
    if keys is None:
        assert gates is not None  # as checked
        if products is None:
            return naive.weighted_values(len(x), values, pairs, gates)
        return function.weighted_values(len(x), values, pairs, gates, products)
    if products is None:
        return naive.block_ffn(x, keys, values, pairs, gates, activation)
    return function.block_ffn(x, keys, values, pairs, gates, activation, products)


def _products(backend: str, values: Tensor) -> Products | None:
    """Who multiplies; None for the oracle, which has no parts."""
    match backend:
        case "naive":
            return None
        case "auto":
            # Not yet triton on a GPU: its tests there have never run.
            return loop if values.is_cuda else cpu.products(values.dtype, values.shape[1])
        case "torch":
            return loop
        case "cpu":
            if values.is_cuda:
                raise ConfigError(
                    "backend cpu computes on a CPU, but the tables are on a GPU; use auto or torch"
                )
            return cpu.products(values.dtype, values.shape[1])
        case "triton":
            return _triton_for(values)
        case _:
            raise AssertionError(f"{backend} is none of {BACKENDS}")


def _triton_for(values: Tensor) -> Products:
    """The Triton kernels, if they can compute on these tables."""
    products = _triton()
    if products is None:
        raise ConfigError(
            "backend triton needs the package triton, which is not installed; install it, or use "
            "auto or torch"
        )
    if values.dtype not in products.DTYPES:
        raise ConfigError(
            f"backend triton computes in float32, bfloat16 or float16, but the tables are "
            f"{values.dtype}; use auto or torch"
        )
    if not (values.is_cuda or products.INTERPRETED):
        raise ConfigError(
            "backend triton computes on a GPU, but the tables are on a CPU; use auto, torch or cpu"
        )
    return products


def _triton() -> Any | None:
    """The module of the Triton kernels; None where triton is not installed."""
    try:
        # Not at the top: it takes a second, and a machine without a GPU has no use for it.
        from megatron_sffn.ops.block_ffn import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return triton
