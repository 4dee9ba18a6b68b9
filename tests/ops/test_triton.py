"""The Triton kernels: their numbers in Triton's interpreter, and on a GPU if there is one.

The interpreter cannot multiply bf16, so bf16 is only compiled (`test_triton_compile.py`) or run on
a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from megatron_sffn.nn.config import Backend
from megatron_sffn.ops import block_ffn, route_topk
from megatron_sffn.ops.backends import BACKENDS
from megatron_sffn.ops.block_ffn import choose_backend, cpu
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@needs_triton
def test_kernels_agree_with_the_oracles_in_the_interpreter() -> None:
    from tests.ops.triton_cases import CHOSEN, FORMS, TOLERANCES, interpreted

    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    for case in interpreted():
        errors = results.pop(", ".join(case))
        for form, product in itertools.product(FORMS, ("to_pairs", "to_rows", "to_table")):
            assert f"{form} {product}" in errors
        assert any(name.startswith("fused") for name in errors)
        for name, error in errors.items():
            # Not `error > tolerance`: NaN is a failure.
            assert error < TOLERANCES[case[-1]], f"{case}: {name} is {error:.2e} off"
    assert len(results) == len(CHOSEN)
    for route_case, shares in results.items():
        assert shares == {"ids": 0, "NaN": 0}, route_case


@needs_triton
@pytest.mark.skipif(is_host(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", ["some", "all to one block", "no pairs", "one row", "many rows"])
@pytest.mark.parametrize("size", ["1x48", "7x16", "16x48", "136x80"])
def test_kernels_agree_with_the_oracles_on_a_gpu(size: str, case: str, dtype: str) -> None:
    from tests.ops.triton_cases import TOLERANCES, errors

    for name, error in errors(case, size, dtype, "cuda").items():
        assert error < TOLERANCES[dtype], f"{name} is {error:.2e} off"


@needs_triton
@pytest.mark.skipif(is_host(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("route_case", ["1 of 1", "33 of 33", "1 of 300", "70 of 5000"])
def test_route_topk_agrees_with_the_oracle_on_a_gpu(route_case: str, dtype: str) -> None:
    from tests.ops.triton_cases import differing_shares

    assert differing_shares(route_case, dtype, "cuda") == {"ids": 0, "NaN": 0}


@needs_triton
@pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET is set: a CPU will do")
@pytest.mark.parametrize(
    "dtype, words",
    [(torch.float32, ("GPU", "torch or cpu")), (torch.float64, ("float64", "torch"))],
)
def test_unsupported_tables_are_refused(dtype: torch.dtype, words: tuple[str, ...]) -> None:
    x, table = torch.zeros(3, 16, dtype=dtype), torch.zeros(2, 5, 16, dtype=dtype)
    with pytest.raises(ConfigError) as caught:
        block_ffn(x, table, table, torch.zeros(3, 1, dtype=torch.long), backend="triton")
    sentence = str(caught.value)
    assert all(word in sentence for word in ("backend triton", *words)), sentence
    with pytest.raises(ConfigError) as caught:
        route_topk(x, 2, backend="triton")
    assert str(caught.value) == sentence


class OnGPU:
    """A stand-in for a GPU tensor, with the attributes that the choice of a backend reads."""

    is_cuda = True
    shape = (3, 4)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@needs_triton
def test_the_triton_backend_accepts_tables_on_a_gpu() -> None:
    from megatron_sffn.ops.block_ffn import triton

    for dtype in triton.DTYPES:
        assert choose_backend.products_for("triton", OnGPU(dtype)) is triton
    assert choose_backend.products_for("auto", torch.zeros(1, 2, 3)) is cpu.products(
        torch.float32, 2
    )


@needs_triton
@pytest.mark.parametrize(
    "cells, spread, dtype, masked",
    [
        (1, 16, torch.bfloat16, ["to_pairs", "to_rows", "to_table"]),
        (16, 4, torch.bfloat16, ["to_pairs", "to_rows", "to_table"]),
        (64, 4, torch.bfloat16, ["to_rows"]),
        (256, 4, torch.bfloat16, []),
        (256, 1, torch.bfloat16, ["to_pairs", "to_rows", "to_table"]),
        (16, 4, torch.float32, ["to_rows"]),
    ],
)
def test_the_faster_form_of_a_product_is_chosen(
    cells: int, spread: int, dtype: torch.dtype, masked: list[str]
) -> None:
    from megatron_sffn.ops.block_ffn import triton, triton_grouped, triton_masked

    def form(product: str, pairs: Sorted) -> object:
        return triton.choose(product, dtype, pairs, 8, cells)

    rows, offsets = torch.zeros(8 * 32 // spread, dtype=torch.int32), torch.zeros(32 + 1)
    for product in triton.SECONDS_PER_BYTE:
        expected = triton_masked if product in masked else triton_grouped
        assert form(product, Sorted(rows=rows, offsets=offsets)) is expected
        # A row may have a block twice, or there may be no pair at all.
        for grouped in (
            Sorted(rows=rows, offsets=offsets, distinct=False),
            Sorted(rows=rows[:0], offsets=offsets),
        ):
            assert form(product, grouped) is triton_grouped


def test_a_missing_triton_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        folder, _, stem = name.rpartition(".")
        if name.startswith("megatron_sffn.ops.") and stem.startswith("triton"):
            monkeypatch.delattr(sys.modules[folder], stem, raising=False)
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="install it"):
        choose_backend.products_for("triton", OnGPU(torch.bfloat16))
    with pytest.raises(ConfigError, match="install it"):
        route_topk(torch.zeros(3, 4), 2, backend="triton")


@pytest.mark.parametrize(
    "choose", [choose_backend.products_for, lambda name, on: route_topk(on, 2, backend=name)]
)
def test_unknown_names_and_wrong_devices_are_refused(
    choose: Callable[[str, OnGPU], object],
) -> None:
    with pytest.raises(ConfigError, match="'cuda' does not exist; use one of auto"):
        choose("cuda", OnGPU(torch.float32))
    with pytest.raises(ConfigError, match="cpu computes on a CPU"):
        choose("cpu", OnGPU(torch.float32))


def test_every_backend_of_the_op_has_a_flag() -> None:
    assert set(BACKENDS) == set(Backend) - {Backend.MEGATRON}
