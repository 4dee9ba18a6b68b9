"""What Triton makes of the kernels, without a GPU: `python -m benchmarks.triton_report`.

Enters: a dtype, the cells of a block, a compute capability. Leaves: for each kernel its registers,
spills, shared memory and matrix instruction.

Choices
- The products are called on tiny tensors of a CPU, with the launch replaced by a note of what
  would be started: the report compiles exactly what would run.
- `ptxas` and `cuobjdump` are those of the triton package. Spills are the bytes of a thread's stack,
  which these kernels use for nothing else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_sffn.errors import ConfigError, run_command
from megatron_sffn.ops.block_ffn import triton as products
from megatron_sffn.ops.block_ffn.pairs import Sorted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

WIDTH = 512
"""D: a multiple of 16, as a model's is, which Triton makes use of."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel as a product would start it."""

    product: str
    kernel: Any
    tiles: products.Tiles
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the product and the kernel."""
        return f"{self.product}: {self.kernel.__name__.removesuffix('_kernel')}"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel: registers and bytes of spills of a thread, shared bytes of a program."""

    kernel: str
    target: int
    dtype: str
    cells: int
    registers: int
    spills: int
    shared: int
    instruction: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_report",
        description="Registers, spills and shared memory of the Triton kernels; needs no GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--cells", type=int, nargs="+", default=[256, 16], help="N of a block (default: 256 16)")
    add("--targets", type=int, nargs="+", default=[80, 90], help="sm_... (default: 80 90)")
    args = parser.parse_args(argv)
    print("kernel                 target  dtype  cells  registers  spills   shared  instruction")
    for dtype in args.dtypes:
        for cells in args.cells:
            for line in report(dtype, cells, args.targets):
                print(
                    f"{line.kernel:22} sm_{line.target:<4} {line.dtype:5} {line.cells:6} "
                    f"{line.registers:10} {line.spills:7} {line.shared:8}  {line.instruction}",
                    flush=True,
                )
    return 0


def report(dtype: str, cells: int, targets: Sequence[int]) -> Iterator[Compiled]:
    """Compile the kernels of all products.

    Args:
        dtype: a key of `DTYPES`.
        cells: N of a block.
        targets: compute capabilities, as 90.

    Raises:
        ConfigError: in Triton's interpreter, which compiles nothing.
    """
    if products.INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    for launch in launches(DTYPES[dtype], cells):
        for target in targets:
            compiled = triton.compile(
                source(launch),
                target=GPUTarget("cuda", target, 32),
                options={"num_warps": launch.tiles.warps, "num_stages": launch.tiles.stages},
            )
            used = resources(compiled.asm["cubin"])
            yield Compiled(
                kernel=launch.name,
                target=target,
                dtype=dtype,
                cells=cells,
                registers=used["REG"],
                spills=used["STACK"] + used["LOCAL"],
                shared=compiled.metadata.shared,
                instruction=instruction(compiled.asm["ptx"]),
            )


def launches(dtype: torch.dtype, cells: int) -> list[Launch]:
    """What the three products start, at a size at which the compiler may assume alignment."""
    found: list[Launch] = []
    x = torch.zeros(4 * products.LEAST, WIDTH, dtype=dtype)
    table = torch.zeros(2, cells, WIDTH, dtype=dtype)
    h = torch.zeros(len(x), cells, dtype=dtype)
    pairs = Sorted(
        rows=torch.arange(len(x), dtype=torch.int32), offsets=torch.tensor([0, 1, len(x)])
    )
    for product, arguments in (
        (products.to_pairs, (x, table, pairs)),
        (products.to_rows, (h, table, pairs, len(x))),
        (products.to_table, (h, x, pairs)),
    ):

        def note(
            kernel: Any, _: int, tiles: products.Tiles, product: Any = product, **arguments: Any
        ) -> None:
            found.append(
                Launch(product=product.__name__, kernel=kernel, tiles=tiles, arguments=arguments)
            )

        with mock.patch.object(products, "launch", note):
            product(*arguments)
    return found


def source(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, specialised as a launch would do it."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        pointer = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if pointer else "i32"
        if pointer or value % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """What one thread of the kernel in an object file uses: REG, STACK, LOCAL and others."""
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
    """The instruction that multiplies matrices, or what does it in its place."""
    for name in ("wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return "fma" if "fma.rn.f32" in ptx else "add"


if __name__ == "__main__":
    run_command(main)
