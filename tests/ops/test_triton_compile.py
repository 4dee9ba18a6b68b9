"""The Triton kernels compiled without a GPU, for sm_90, 100, 120, and for sm_80 in fp32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.slow import slow

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program can have, by compute capability (CUDA's tables)."""

MATRIX_UNITS = {90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
"""The instruction of the matrix units, by compute capability; sm_80 is compiled in fp32 alone."""

REGISTERS = 240
"""Most registers per thread; with more than 255 the compiler spills."""

SPILLS = {("3.6", "route_topk: select", "fp32"): 8}
"""Spilled bytes per thread by Triton version, kernel and dtype; all other kernels spill nothing."""


REPORTS = (
    ("--dtypes bf16 --targets 90", 23),
    ("--dtypes bf16 --targets 100 120 --ops grouped --cells 256", 10),
)
"""Command lines of the report and their numbers of kernels: all kernels of one GPU, and those with
the largest tiles on the other GPUs with matrix units."""

OTHER_REPORTS = (
    # Fused kernels are cut as for 90, and need fewer registers.
    ("--dtypes bf16 --targets 100 --ops grouped masked", 18),
    # The instructions of 80, with less shared memory.
    ("--dtypes bf16 --targets 120 --ops grouped fused", 14),
    ("--dtypes fp32 --targets 80 --ops grouped masked route_topk --cells 16", 10),
)
"""The kernels that differ on other GPUs, which take half a minute to compile."""


@pytest.mark.parametrize("reports", [REPORTS, slow(OTHER_REPORTS)], ids=["fast", "slow"])
def test_machine_code_spills_nothing_and_uses_matrix_units(
    reports: tuple[tuple[str, int], ...], tmp_path: Path
) -> None:
    # This process simulates a GPU, so another one compiles; one for all reports, since a process
    # takes seconds to start.
    program = "import sys; from benchmarks.triton_report import main\n"
    program += "for line in sys.argv[1:]: main(line.split())"
    process = subprocess.run(
        [sys.executable, "-c", program, *(line for line, _ in reports)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    lines = re.findall(
        r"^([\w ]+: \w+) +sm_(\d+) +(\w+) +(\S+) +(\d+) +(\d+) +(\d+) +(\S+)$",
        process.stdout,
        re.MULTILINE,
    )
    assert len(lines) == sum(count for _, count in reports), process.stdout
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    for kernel, target, dtype, cells, registers, spills, shared, instruction in lines:
        line = f"{kernel}, sm_{target}, {dtype}, {cells} cells, Triton {version}"
        assert int(spills) <= SPILLS.get((version, kernel, dtype), 0), f"{line}: {spills}"
        assert int(registers) <= REGISTERS, f"{line}: {registers}"
        assert int(shared) <= SHARED[int(target)], f"{line}: {shared}"
        product = kernel.endswith(
            ("multiply", "to_pairs", "to_rows", "to_table", "up", "down_backward")
        )
        if product and dtype == "bf16" and (cells == "256" or kernel.startswith("masked")):
            assert instruction == MATRIX_UNITS[int(target)], line


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
)
def test_a_changed_number_of_rows_compiles_nothing_again() -> None:
    from triton.backends.compiler import GPUTarget

    from benchmarks import triton_report

    def compiled(rows: int) -> set[tuple[str, str, str]]:
        """The kernels, with the keys by which Triton's launcher looks up compiled code."""
        target = GPUTarget("cuda", 90, 32)
        special = [
            (launch.name, triton_report.specialised(launch, target))
            for launch in triton_report.launches(torch.bfloat16, None, 90, rows)
        ]
        return {(name, code.key, str(code.options)) for name, code in special}

    # A multiple of 16, a number that is none, and 1 are three cases for Triton; one pair is not
    # cut into chunks, which leaves out a kernel.
    assert compiled(2048) == compiled(2049) > compiled(1)
    assert len(compiled(1)) > 10


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
)
def test_kernels_compiled_ahead_are_found_at_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache distinguishes True from 1; the launcher passes integers."""
    import triton

    from benchmarks import triton_report, triton_starts
    from benchmarks.gpu.sections import tune
    from megatron_sffn.ops.block_ffn import triton_grouped

    launches: list[tuple[str, list[tuple[str, str]]]] = []

    def run(kernel: Any, *_: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        constants = [
            (name, repr(argument))
            for name, argument in arguments.items()
            if not isinstance(argument, torch.Tensor)
        ]
        launches.append((kernel.fn.__name__, constants))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    x, table, h, pairs = triton_report._operands(torch.bfloat16, 16, 2048)

    def starts() -> list[tuple[str, list[tuple[str, str]]]]:
        launches.clear()
        triton_grouped.to_pairs(x, table, pairs)
        triton_grouped.to_rows(h, table, pairs, 2048)
        triton_grouped.to_table(h, x, pairs, into=table.float())
        return sorted((name, sorted(constants)) for name, constants in launches)

    launched = starts()
    with triton_starts.handed_to(tune.warm_up):
        ahead = starts()
    starts_noted: list[triton_starts.Start] = []
    with triton_starts.handed_to(starts_noted.append):
        starts()
    assert ahead == launched
    assert {("GATHER", "1"), ("ADD", "1")} <= {fixed for _, start in launched for fixed in start}
    assert len(starts_noted) == len(launched)
    assert not any(isinstance(a, bool) for start in starts_noted for a in start.arguments.values())
