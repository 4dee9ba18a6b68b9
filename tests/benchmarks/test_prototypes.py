"""Prototypes of kernels compute the right numbers in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SCRIPT = """
import json
import torch
from benchmarks.prototypes.token_stationary import Tile, starts, to_rows
from megatron_sffn.ops.block_ffn import torch_backend
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

errors = {}
for name, rows, blocks, tile in (
    ("ragged", 37, 6, Tile(tokens=16, columns=32, pairs=16, cells=16, warps=4)),
    ("more pairs than a tile", 70, 3, Tile(tokens=64, columns=64, pairs=16, cells=16, warps=4)),
    ("one row", 1, 2, Tile(tokens=16, columns=16, pairs=16, cells=16, warps=4)),
):
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(rows)
        mask = torch.rand(rows, blocks) < 0.7
        mask[:, 1] = False  # a block without rows
        mask[1::4] = False  # rows without a block
        mask[0, 0] = True
        indices = mask.nonzero().int()
        order, offsets = sort_by_block(indices[:, 1].contiguous(), blocks)
        pairs = Sorted(rows=indices[order.long(), 0], offsets=offsets)
        h = torch.randn(len(order), 24).to(dtype)
        table = torch.randn(blocks, 24, 48).to(dtype)
        expected = torch_backend.to_rows(h.double(), table.double(), pairs, rows)
        actual = to_rows(h, table, pairs, rows, tile)
        assert torch.equal(actual, to_rows(h, table, pairs, rows, tile)), "other bits"
        assert actual.dtype == dtype
        errors[f"{name}, {dtype}"] = ((actual.double() - expected).norm() / expected.norm()).item()
        index = starts(pairs, rows, tile.tokens)
        assert torch.equal(index[0], offsets[:-1]) and torch.equal(index[-1], offsets[1:])
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_token_stationary_sums_equal_the_oracle_and_are_deterministic() -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    errors = json.loads(process.stdout)
    assert len(errors) == 6
    for case, error in errors.items():
        assert error < (1e-6 if case.endswith("float32") else 1e-3), f"{case}: {error:.1e}"
