"""The operator that launches Triton kernels: torch's checks of it, and the widths it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_sffn.ops import block_ffn
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
def test_torch_compile_and_opcheck_pass_for_every_kernel() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_operator"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    errors = json.loads(process.stdout)
    assert errors.pop("change") == 0
    kernels = {kernel.partition("(")[0] for kernel in errors}
    # Each kernel has one call that launches it.
    launched = {
        *("triton:select", "triton_index:index", "triton_grouped:sum", "triton_grouped:multiply"),
        *("triton_fused:up", "triton_fused:down_backward"),
        *("triton_table:to_table", "triton_table:sum_chunks"),
        *(f"triton_masked:{product}" for product in ("to_pairs", "to_rows", "to_table")),
    }
    assert kernels == {f"{kernel}_kernel" for kernel in launched}
    assert {
        kernel: kernel_errors for kernel, kernel_errors in errors.items() if kernel_errors
    } == {}


@needs_triton
def test_unsupported_widths_are_refused() -> None:
    x, ids = torch.zeros(3, 24), torch.zeros(3, 1, dtype=torch.long)
    keys, values = torch.zeros(2, 5, 24), torch.zeros(2, 5, 16)
    for sizes, table in (("keys is 24", values), ("values is 24", keys)):
        with pytest.raises(ConfigError) as caught:
            rows = x[:, : 24 if table is values else 16]
            block_ffn(rows, keys[..., : rows.shape[1]], table, ids, backend="triton")
        assert str(caught.value) == (
            f"backend triton needs multiples of 16, and the width of {sizes}; use auto, masked or "
            "torch"
        )
