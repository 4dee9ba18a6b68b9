"""The calls of quack-kernels, checked by the documented meaning, because its kernels need a GPU.

`gemm` and `gemm_add_inplace` below are this meaning in plain torch. If the package is installed,
its own reference and its signatures confirm it.
"""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sffn.ops import block_ffn
from megatron_sffn.ops.block_ffn import choose_backend, grouped, quack
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.utils.errors import ConfigError
from tests.ops.test_torch_backends import D, R, load
from tests.support.simulated_gpu import simulate_gpu


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    tuned: bool = True,
) -> Tensor:
    """Multiply groups of rows of A with matrices of B, or groups of columns of A with rows of B."""
    ends = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert ends.dtype == torch.int32 and (A_idx is None or A_idx.dtype == torch.int32)
    for group, (first, last) in enumerate(itertools.pairwise(ends)):
        index = slice(first, last) if A_idx is None else A_idx[first:last]
        if cu_seqlens_k is None:
            assert A.stride(-1) == out.stride(-1) == 1  # as the package asserts
            out[first:last] = A[index] @ B[group]
        else:
            assert A.stride(-2) == B.stride(-1) == 1  # likewise
            out[group] = A[:, index] @ B[first:last]
    return out


def gemm_add_inplace(A: Tensor, B: Tensor, out: Tensor, **arguments: Any) -> None:
    assert out.dtype == torch.float32
    out += gemm(A, B, torch.empty_like(out), **arguments)


def call() -> tuple[Sorted, Tensor, Tensor, Tensor]:
    """Pairs with an empty block, rows, a table and coefficients."""
    torch.manual_seed(0)
    pairs = load("skewed", 5)
    order, offsets = quack.sort(pairs.blocks, 5)
    by_block = Sorted(rows=pairs.rows[order], offsets=offsets, order=order)
    return by_block, torch.randn(R, D), torch.randn(5, 8, D), torch.randn(len(pairs.rows), 8)


def test_the_products_are_those_of_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(gemm=gemm, gemm_add_inplace=gemm_add_inplace)
    monkeypatch.setattr(quack, "kernels", lambda: package)
    monkeypatch.setattr(grouped, "SCRATCH_BYTES", 1)
    pairs, rows, table, coefficients = call()
    for actual, expected in (
        (quack.to_pairs(rows, table, pairs), grouped.to_pairs(rows, table, pairs)),
        (
            quack.to_rows(coefficients, table, pairs, R),
            grouped.to_rows(coefficients, table, pairs, R),
        ),
        (quack.to_table(coefficients, rows, pairs), grouped.to_table(coefficients, rows, pairs)),
    ):
        torch.testing.assert_close(actual, expected)
    buffer = torch.ones(5, 8, D)
    assert quack.to_table(coefficients, rows, pairs, into=buffer) is buffer
    torch.testing.assert_close(buffer - 1, grouped.to_table(coefficients, rows, pairs))


def test_without_pairs_no_kernel_is_called() -> None:
    pairs = Sorted(
        rows=torch.zeros(0, dtype=torch.int32), offsets=torch.zeros(6, dtype=torch.int64)
    )
    rows, table, coefficients = torch.ones(R, D), torch.ones(5, 8, D), torch.ones(0, 8)
    assert quack.to_pairs(rows, table, pairs).shape == (0, 8)
    assert not quack.to_rows(coefficients, table, pairs, R).any()
    assert not quack.to_table(coefficients, rows, pairs).any()


def test_the_installed_package_computes_the_same() -> None:
    package = pytest.importorskip(
        quack.MODULE, reason="quack-kernels, an extra for GPU machines, is not installed"
    )
    pairs, rows, table, coefficients = call()
    offsets = pairs.offsets.int()
    for A, B, arguments in (
        (rows, table.mT, {"cu_seqlens_m": offsets, "A_idx": pairs.rows}),
        (coefficients, table, {"cu_seqlens_m": offsets}),
        (rows.mT, coefficients, {"cu_seqlens_k": offsets, "A_idx": pairs.rows}),
    ):
        out = torch.empty(
            (5, A.shape[0], B.shape[1])
            if "cu_seqlens_k" in arguments
            else (len(pairs.rows), B.shape[2])
        )
        for product in (package.gemm, package.gemm_add_inplace):
            inspect.signature(product).bind(A, B, out=out, tuned=False, **arguments)
        torch.testing.assert_close(
            package.gemm_ref(A, B, **arguments), gemm(A, B, out, **arguments)
        )


def test_unsupported_inputs_are_refused_and_alternatives_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, table = torch.zeros(3, 16), torch.zeros(2, 8, 16)
    with pytest.raises(ConfigError, match="backend quack computes on a GPU"):
        block_ffn(x, table, table, torch.zeros(3, 1, dtype=torch.long), backend="quack")
    simulate_gpu(monkeypatch, capability=(7, 5), name="an old GPU")
    shape = choose_backend.Shape(rows=3, pairs=3, blocks=2, cells=8, width=16, key_width=16)
    for dtype, words in ((torch.float32, "or float16, but"), (torch.float16, "an old GPU has 7.5")):
        assert words in choose_backend.refusal("quack", shape, x.to(dtype))
    monkeypatch.setattr(quack, "MODULE", "quack_that_is_not_there.gemm_interface")
    quack.kernels.cache_clear()
    with pytest.raises(ConfigError, match="quack_that_is_not_there is not installed; install"):
        choose_backend.products_for("quack", x)
