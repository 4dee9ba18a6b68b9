"""Nsight Compute over one launch of every kernel: what it is bound by.

Outputs: ncu.csv, a line for each kernel and metric. Where ncu is not installed, or the container
forbids its counters, the cases count as skipped; a dry run then starts the watched program alone.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure, NotHere

METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
"""Time, and the shares of what can be had: tensor pipe, L2 with its hits, memory, instructions."""

SECONDS = 60


def cases(context: Context) -> list[Case]:
    """Every Triton module, at wide and narrow blocks."""
    found = [
        Case(name=f"{name} g={g}", run=functools.partial(watch, name, g, context))
        for g in context.choose((256, 16, 1), (16,))
        for name in forms.modules()
        if name.startswith("triton_")
    ]
    return found[: context.choose(len(found), 1)]


def watch(name: str, g: int, context: Context) -> dict[str, Any]:
    """The small program at a real size, under the profiler."""
    path = shutil.which("ncu")
    if path is None and not context.dry:
        raise NotHere("ncu is not installed (it is part of the CUDA toolkit)")
    tokens, width, active = context.choose((8192, 4096, 4096), (3, 16, 16))
    program = [sys.executable, "-m", "benchmarks.gpu.small", name, "--cells", str(g)]
    program += ["--tokens", str(tokens), "--width", str(width), "--active", str(active)]
    watcher = []
    if path:
        watcher = [path, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)]
        watcher += ["--kernel-name", "regex:.*_kernel$", "--launch-count", "8"]
    done = subprocess.run(
        [*watcher, *program],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    print(done.stderr[-4000:], flush=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if path and (done.returncode or not lines):
        said = [line for line in done.stdout.splitlines() if "==ERROR==" in line]
        raise NotHere(f"ncu does not run here: {(said or ['no metrics'])[0]}")
    if done.returncode:
        raise Failure(f"the program ended with exit code {done.returncode}")
    if path is None:
        raise NotHere("ncu is not installed; the program it would watch runs")
    with (context.out / "ncu.csv").open("a", encoding="utf-8") as file:
        file.write(f"# {name}, g = {g}\n" + "\n".join(lines) + "\n")
    return {"lines": len(lines)}
