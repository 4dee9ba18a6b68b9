"""Reports the card and the versions, and measures two limits: a copy and a dense matmul."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu.case import Case, Context, Failure
from benchmarks.gpu.clock import measure
from benchmarks.machine import version_of

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "numpy")


def cases(context: Context) -> list[Case]:
    """The cases: versions, the card, and the speed limits."""
    return [
        Case(name="versions", run=versions),
        Case(name="card", run=lambda: card(context)),
        Case(name="ceilings", run=lambda: ceilings(context)),
    ]


def versions() -> dict[str, Any]:
    """Versions of Python, the packages and CUDA; Megatron's wheel must be installed."""
    import platform

    version_of_package = {name: version_of(name) for name in PACKAGES}
    if not version_of_package["megatron-core"]:
        raise Failure("megatron-core is not installed; docs/gpu.md says how to bring its wheel")
    words = ", ".join(f"{name} {number or 'absent'}" for name, number in version_of_package.items())
    python = platform.python_version()
    return {**version_of_package, "python": python, "cuda": torch.version.cuda, "print": [words]}


def card(context: Context) -> dict[str, Any]:
    """Name, capability and memory of the card, and the output of nvidia-smi."""
    tools = {name: shutil.which(name) or "" for name in ("nvidia-smi", "compute-sanitizer", "ncu")}
    smi_line = ""
    if tools["nvidia-smi"]:
        fields = "name,driver_version,clocks.max.sm,power.limit,ecc.mode.current,memory.total"
        command = [tools["nvidia-smi"], f"--query-gpu={fields}", "--format=csv,noheader"]
        smi_line = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False
        ).stdout
    if context.dry:
        return {"name": "cpu", "tools": tools, "nvidia_smi": smi_line.strip()}
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "tools": tools,
        "nvidia_smi": smi_line.strip(),
        "print": [
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {smi_line.strip()}"
        ],
    }


def ceilings(context: Context) -> dict[str, Any]:
    """Bytes per second of a copy, operations per second of a square bf16 matmul."""
    numbers = context.choose(1 << 29, 1 << 16)
    source = torch.ones(numbers, dtype=torch.bfloat16, device=context.device)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), context)
    side = context.choose(8192, 64)
    square = torch.ones(side, side, dtype=torch.bfloat16, device=context.device)
    product = measure(lambda: square @ square, context)
    copy = 4 * numbers / copied.median * 1e3
    flops = 2 * side**3 / product.median * 1e3
    words = f"copy {copy / 1e12:.2f} TB/s, a product of {side}³ in bf16 {flops / 1e12:.0f} TFLOP/s"
    return {"copy_bytes_per_second": copy, "flops_per_second": flops, "print": [words]}
