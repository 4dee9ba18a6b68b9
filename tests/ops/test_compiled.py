"""Building the C++ kernels, and the fallback to plain torch if they cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import HANGS

SAME_AS_TORCH = """
import torch
from megatron_sffn.ops import block_ffn, route_topk
from megatron_sffn.ops.compiled import kernels

torch.manual_seed(0)
x, keys, values = torch.randn(50, 37), torch.randn(9, 21, 37), torch.randn(9, 21, 37)
scores = torch.randn(50, 9)
ids = route_topk(scores, 4)
assert torch.equal(ids, route_topk(scores, 4, backend="naive"))
actual, oracle = (block_ffn(x, keys, values, ids, backend=name) for name in ("auto", "naive"))
torch.testing.assert_close(actual, oracle, rtol=1e-4, atol=1e-4)
print("without" if kernels() is None else "with", "kernels")
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SAME_AS_TORCH],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_of_two_processes_one_compiles_for_the_default_instruction_set(tmp_path: Path) -> None:
    runs = [start(tmp_path, ATEN_CPU_CAPABILITY="default") for _ in range(2)]
    outputs = [run.communicate(timeout=HANGS) for run in runs]
    assert [output for output, _ in outputs] == ["with kernels\n"] * 2, outputs
    compiled = sum("compiling" in errors for _, errors in outputs)
    assert compiled == 1, "one process compiles, and the other waits"
    suffixes = sorted(path.suffix for path in (tmp_path / "megatron_sffn").iterdir())
    assert suffixes == [".lock", ".so"], "nothing else stays"


def test_without_a_compiler_torch_computes_with_one_warning(tmp_path: Path) -> None:
    output, errors = start(tmp_path, CXX="no-such-compiler").communicate(timeout=HANGS)
    assert output == "without kernels\n", errors
    lines = [line for line in errors.splitlines() if line.startswith("C++ kernels cannot be built")]
    assert len(lines) == 1 and "no-such-compiler" in lines[0]


def test_the_warning_contains_the_error_of_the_compiler(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no C++20' >&2\nexit 1\n")
    compiler.chmod(0o755)
    output, errors = start(tmp_path / "cache", CXX=str(compiler)).communicate(timeout=HANGS)
    assert output == "without kernels\n", errors
    assert "error: no C++20" in errors
