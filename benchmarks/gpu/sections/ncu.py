"""Profile one launch of every kernel with Nsight Compute, to see what bounds it.

Outputs: ncu.csv, a line per kernel and metric. If ncu is not installed, takes too long, or the
container forbids performance counters, the cases count as skipped; a dry run then starts the
program without ncu.
"""

from __future__ import annotations

import functools
import shutil
from typing import Any

from benchmarks.gpu.case import Case, Context, NotHere
from benchmarks.gpu.small import ROUTE, targets
from benchmarks.gpu.watched import watched

METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
"""Time, and utilisation in percent: tensor pipe, L2 with its hit rate, memory, instructions."""


def cases(context: Context) -> list[Case]:
    """Every target at wide and narrow blocks, then `route_topk`."""
    kernels = [name for name in targets() if name != ROUTE]
    all_cases = [
        Case(name=f"{name} g={g}", run=functools.partial(watch, name, g, context))
        for g in context.choose((256, 16, 1), (16,))
        for name in kernels
    ]
    all_cases += [Case(name=ROUTE, run=functools.partial(watch, ROUTE, 16, context))]
    return all_cases[: context.choose(len(all_cases), 1)]


def watch(name: str, g: int, context: Context) -> dict[str, Any]:
    """Run the small program at a real size under the profiler."""
    path = shutil.which("ncu")
    tokens, width, active = context.choose((8192, 4096, 4096), (3, 16, 16))
    size = f"--cells {g} --tokens {tokens} --width {width} --active {active}".split()
    watcher = []
    if path:
        watcher = [path, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)]
        watcher += ["--kernel-name", "regex:.*_kernel$", "--launch-count", "8"]
    result = watched("ncu", watcher, (name, *size), context)
    lines = [line for line in result.stdout.splitlines() if line.startswith('"')]
    other_lines = [line for line in result.stdout.splitlines() if not line.startswith('"')]
    print("\n".join(other_lines)[-4000:], flush=True)
    if result.returncode or not lines:
        errors = [line for line in other_lines if "==ERROR==" in line]
        raise NotHere(f"ncu does not run here: {(errors or ['no metrics'])[0]}")
    with (context.out / "ncu.csv").open("a", encoding="utf-8") as file:
        file.write(f"# {name}, g = {g}\n" + "\n".join(lines) + "\n")
    return {"lines": len(lines)}
