"""The Triton kernels: numbers in Triton's interpreter, code for two GPUs, and a GPU if it is there.

The interpreter cannot multiply bf16; that is left to the compiler here and to a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sffn.config import Backend
from megatron_sffn.errors import ConfigError
from megatron_sffn.ops import block_ffn
from megatron_sffn.ops.block_ffn import cpu, loop, op
from megatron_sffn.platforms.cpu import is_host

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
interpreted = os.environ.get("TRITON_INTERPRET") == "1"

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program can have, by compute capability (CUDA's tables)."""

REGISTERS = 184
"""Of a thread. 255 is where spills begin."""


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    from tests.ops.triton_cases import CASES, SIZES, TOLERANCES

    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert len(found) == (len(CASES) + 1) * len(SIZES)
    for case, errors in found.items():
        assert {"to_pairs", "to_rows", "to_table"} <= errors.keys()
        for name, error in errors.items():
            # Not `error > tolerance`: NaN is a failure.
            assert error < TOLERANCES[case[-4:]], f"{case}: {name} is {error:.2e} off"


@needs_triton
@pytest.mark.skipif(is_host(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", ["some", "all to one block", "no pairs", "one row"])
@pytest.mark.parametrize("size", ["1x50", "16x50", "40x150"])
def test_numbers_on_a_gpu(size: str, case: str, dtype: str) -> None:
    from tests.ops.triton_cases import TOLERANCES, errors

    for name, error in errors(case, size, dtype, "cuda").items():
        assert error < TOLERANCES[dtype], f"{name} is {error:.2e} off"


@needs_triton
def test_code_for_a_gpu_spills_nothing_and_uses_matrix_units(tmp_path: Path) -> None:
    # In a process of its own: this one has been made to believe in a GPU.
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_report"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = re.findall(
        r"^(\w+: \w+) +sm_(\d+) +(\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\S+)$",
        process.stdout,
        re.MULTILINE,
    )
    assert len(lines) == 4 * 2 * 2 * 2, process.stdout
    for kernel, target, dtype, cells, registers, spills, shared, instruction in lines:
        line = f"{kernel}, sm_{target}, {dtype}, {cells} cells"
        assert int(spills) == 0, line
        assert int(registers) <= REGISTERS, f"{line}: {registers}"
        assert int(shared) <= SHARED[int(target)], f"{line}: {shared}"
        if kernel != "to_rows: sum" and dtype == "bf16" and cells == "256":
            assert instruction == {"80": "mma.sync", "90": "wgmma.mma_async"}[target], line


@needs_triton
@pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET is set: a CPU will do")
@pytest.mark.parametrize(
    "dtype, words",
    [(torch.float32, ("GPU", "torch or cpu")), (torch.float64, ("float64", "torch"))],
)
def test_tables_that_the_kernels_cannot_take(dtype: torch.dtype, words: tuple[str, ...]) -> None:
    x, table = torch.zeros(3, 4, dtype=dtype), torch.zeros(2, 5, 4, dtype=dtype)
    with pytest.raises(ConfigError) as caught:
        block_ffn(x, table, table, torch.zeros(3, 1, dtype=torch.long), backend="triton")
    sentence = str(caught.value)
    assert all(word in sentence for word in ("backend triton", *words)), sentence
    assert "activation" not in sentence


class OnGPU:
    """What the choice of a backend looks at in a table."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@needs_triton
def test_tables_on_a_gpu() -> None:
    from megatron_sffn.ops.block_ffn import triton

    for dtype in triton.DTYPES:
        assert op._products("triton", OnGPU(dtype)) is triton
        assert op._products("auto", OnGPU(dtype)) is loop
    assert op._products("auto", torch.zeros(1, 2, 3)) is cpu.products(torch.float32, 2)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[op.__package__], "triton", raising=False)
    monkeypatch.delitem(sys.modules, f"{op.__package__}.triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="install it"):
        op._products("triton", OnGPU(torch.bfloat16))


def test_every_backend_of_the_op_has_a_flag() -> None:
    assert set(op.BACKENDS) == set(Backend) - {Backend.MEGATRON}
