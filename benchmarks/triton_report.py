"""Reports how Triton compiles the kernels, without a GPU: `python -m benchmarks.triton_report`.

Inputs: a dtype, the cells per block, a compute capability. Outputs: for each kernel its registers,
spills, shared memory and matrix instruction.

Design notes:
- The ops are called on tiny CPU tensors, and their launches are recorded instead of run: the report
  compiles exactly what would run.
- `ptxas` and `cuobjdump` are those of the triton package. Spills are the bytes of a thread's stack,
  which these kernels use for nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import triton_starts
from megatron_sffn.ops import device, triton_launch
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import triton_fused, triton_grouped, triton_masked
from megatron_sffn.ops.block_ffn.autograd import Products
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.route_topk import triton as topk
from megatron_sffn.utils.errors import ConfigError, run_command

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FORMS = {"grouped": (triton_grouped, (256, 16)), "masked": (triton_masked, (16, 1))}
"""Form of the products -> cells per block for which it is made."""

FUSED = (Activation.GELU, Activation.SWIGLU)
"""Activations of the fused products: the most expensive one, and the one with most operands."""

OPS = ("grouped", "masked", "fused", "route_topk")
"""Groups of kernels that the command line can select."""

WIDTH = 512
"""D, a multiple of 16 as in a model, because Triton specialises on that."""

ROWS = 2048
"""R, more than a tile and more than a chunk of pairs."""

BLOCKS = 8192
"""B for `route_topk`, more than one tile of a row."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel launch of an op, with the cells per block if the op has blocks."""

    op: str
    cells: int | None
    kernel: Any
    warps: int
    stages: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the op and the kernel."""
        return f"{self.op}: {self.kernel.__name__.removesuffix('_kernel')}"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel: registers and spilled bytes per thread, shared bytes per program."""

    kernel: str
    target: int
    dtype: str
    cells: int | None
    registers: int
    spills: int
    shared: int
    instruction: str


@dataclass(frozen=True, kw_only=True)
class Specialised:
    """The input of a compilation: the kernel with the types of its arguments, options and a key.

    Launches of a kernel with equal keys and options run the same code; a new key is compiled at its
    first launch.
    """

    source: ASTSource
    options: dict[str, Any]
    key: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report for the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_report",
        description="Registers, spills and shared memory of the Triton kernels; needs no GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--cells", type=int, nargs="+", help="N, cells per block (default: 256 16; masked: 16 1)")
    add(
        "--targets",
        type=int,
        nargs="+",
        default=[80, 90, 100, 120],
        help="sm_... (default: 80 90 100 120)",
    )
    add("--ops", nargs="+", choices=OPS, default=OPS, help="groups of kernels (default: all)")
    args = parser.parse_args(argv)
    print(
        "kernel                      target  dtype  cells  registers  spills   shared  instruction"
    )
    for dtype in args.dtypes:
        for line in report(dtype, args.cells, args.targets, args.ops):
            print(
                f"{line.kernel:27} sm_{line.target:<4} {line.dtype:5} {line.cells or '-':>6} "
                f"{line.registers:10} {line.spills:7} {line.shared:8}  {line.instruction}",
                flush=True,
            )
    return 0


def report(
    dtype: str, cells: Sequence[int] | None, targets: Sequence[int], ops: Sequence[str] = OPS
) -> Iterator[Compiled]:
    """Compile kernels.

    Args:
        dtype: a key of `DTYPES`.
        cells: N, cells per block; None for those of `FORMS`.
        targets: compute capabilities, such as 90.
        ops: names of `OPS`.

    Raises:
        ConfigError: in Triton's interpreter, which compiles nothing.
    """
    if triton_launch.INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    for target in targets:
        gpu = GPUTarget("cuda", target, 32)
        for launch in launches(DTYPES[dtype], cells, target):
            if not launch.op.startswith(tuple(ops)):
                continue
            special = specialised(launch, gpu)
            compiled = triton.compile(special.source, target=gpu, options=special.options)
            used = resources(compiled.asm["cubin"])
            yield Compiled(
                kernel=launch.name,
                target=target,
                dtype=dtype,
                cells=launch.cells,
                registers=used["REG"],
                spills=used["STACK"] + used["LOCAL"],
                shared=compiled.metadata.shared,
                instruction=instruction(compiled.asm["ptx"]),
            )


def launches(
    dtype: torch.dtype, cells: Sequence[int] | None, target: int, rows: int = ROWS
) -> list[Launch]:
    """The launches of the ops on a GPU, at sizes for which the compiler may assume alignment."""
    # The tile sizes depend on the compute capability.
    with mock.patch.object(device, "capability", lambda _: divmod(target, 10)):
        return [*_all_launches(dtype, cells, rows)]


def _all_launches(dtype: torch.dtype, cells: Sequence[int] | None, rows: int) -> Iterator[Launch]:
    for form, (products, usual) in FORMS.items():
        for size in cells or usual:
            yield from _launches(form, products, dtype, size, rows)
    for activation, size in itertools.product(FUSED, cells or FORMS["grouped"][1][:1]):
        yield from _fused_launches(activation, dtype, size, rows)
    scores = torch.zeros(rows, BLOCKS, dtype=dtype)
    yield from _recorded("route_topk", None, topk.route_topk, scores, BLOCKS // 16)


def _launches(
    form: str, products: Products, dtype: torch.dtype, cells: int, rows: int
) -> Iterator[Launch]:
    """The launches of the products of one form, if all rows have the first block."""
    x, table, h, pairs = _operands(dtype, cells, rows)
    for product, arguments in (
        (products.to_pairs, (x, table, pairs)),
        (products.to_rows, (h, table, pairs, rows)),
        (products.to_table, (h, x, pairs)),
    ):
        yield from _recorded(f"{form} {product.__name__}", cells, product, *arguments)


def _fused_launches(
    activation: Activation, dtype: torch.dtype, cells: int, rows: int
) -> Iterator[Launch]:
    """The launches of the fused products, with gates."""
    x, values, h, pairs = _operands(dtype, cells, rows)
    keys = values.repeat(1, activation.keys_per_cell, 1)
    ups = h.repeat(1, activation.keys_per_cell)
    gates = torch.zeros(rows)
    for product, arguments in (
        (triton_fused.up_activated, (x, keys, pairs, gates, activation)),
        (triton_fused.down_backward_activated, (x, values, pairs, ups, gates, activation)),
    ):
        yield from _recorded(f"fused {activation}", cells, product, *arguments)


def _operands(dtype: torch.dtype, cells: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Sorted]:
    """Rows, a table, coefficients and pairs: all rows have the first block."""
    num_blocks = max(2, ROWS // cells)
    pairs = Sorted(
        rows=torch.arange(rows, dtype=torch.int32), offsets=torch.tensor([0] + num_blocks * [rows])
    )
    x = torch.zeros(rows, WIDTH, dtype=dtype)
    table = torch.zeros(num_blocks, cells, WIDTH, dtype=dtype)
    return x, table, torch.zeros(rows, cells, dtype=dtype), pairs


def _recorded(
    op: str, cells: int | None, call: Callable[..., Any], *arguments: Any
) -> list[Launch]:
    """The launches of a call, recorded instead of run."""
    launches: list[Launch] = []

    def note(start: triton_starts.Start) -> None:
        launches.append(
            Launch(
                op=op,
                cells=cells,
                kernel=start.kernel,
                warps=start.warps,
                stages=start.stages,
                arguments=start.arguments,
            )
        )

    with triton_starts.handed_to(note):
        call(*arguments)
    return launches


def specialised(launch: Launch, target: GPUTarget) -> Specialised:
    """The compilation that Triton's launcher would start for a launch, and its key in the cache."""
    backend = make_backend(target)
    kernel = launch.kernel
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "debug": False,
        "instrumentation_mode": "",
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, key, rest = bind(**launch.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, key, rest
    )
    return Specialised(
        source=ASTSource(kernel, signature, constants, attributes),
        options=vars(options),
        key=str(key),
    )


def resources(cubin: bytes) -> dict[str, int]:
    """The resources of one thread of the kernel in an object file: REG, STACK, LOCAL and others."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        output = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


def instruction(ptx: str) -> str:
    """The instruction that multiplies matrices, or the one used instead."""
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return "fma" if "fma.rn.f32" in ptx else "add"


if __name__ == "__main__":
    run_command(main)
