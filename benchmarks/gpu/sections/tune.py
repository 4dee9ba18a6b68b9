"""Find the fastest tile sizes of every Triton kernel on this card, among a few candidates.

Outputs: tiles.json, and a line per winner in the form of the table `TILES` of its module.

Design notes: candidates are first compiled into Triton's disk cache by several processes. A
candidate is dropped if it does not compile, needs more than the card has, or computes another
result. Every time is that of the whole product, with what it derives from the pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure, NotHere
from benchmarks.gpu.clock import measure
from benchmarks.gpu.tiles import Job, Tuned, card, jobs, opened
from benchmarks.gpu.worker import is_of_cuda
from benchmarks.triton_starts import Start, handed_to

LEAST_GAIN = 0.02
"""A candidate is proposed if it saves at least this share of the time."""

TOLERANCE = 1e-2
"""Largest relative difference of the results of two candidates."""

COMPILING = 0.4
"""Share of the section's time for compiling ahead."""


def cases(context: Context) -> list[Case]:
    """Compile everything, then one case per module, product and g."""
    compile_case = Case(name="compile ahead", run=lambda: compile_ahead(context))
    return [
        compile_case,
        *(Case(name=job.name, run=functools.partial(tune, job, context)) for job in jobs(context)),
    ]


def tune(job: Job, context: Context) -> dict[str, Any]:
    """Time the candidates of an entry."""
    with opened(job, context) as tuned:
        ms_of, reasons = times(tuned, context)
    if not ms_of:
        raise NotHere(f"no candidate compiles: {reasons[:2]}")
    best = min(ms_of, key=lambda number: ms_of[number])
    if 0 in ms_of and ms_of[0] <= ms_of[best] * (1 + LEAST_GAIN):
        best = 0
    dtype = forms.dtype_for(job.module, context)
    line = f'("{card()}", {dtype}, "{tuned.kind}"): {tuned.tried[best]},'
    line += f"  # {job.name}: {ms_of[best]:.3g} ms, now {ms_of.get(0, float('nan')):.3g}"
    timed = [{**dataclasses.asdict(tuned.tried[n]), "ms": ms} for n, ms in ms_of.items()]
    entry = {**dataclasses.asdict(job), "kind": tuned.kind, "line": line}
    add({**entry, "candidates": timed, "refused": reasons}, context.out / "tiles.json")
    return {"line": line, "print": [line] if best else []}


def times(tuned: Tuned, context: Context) -> tuple[dict[int, float], list[str]]:
    """Number of a candidate -> milliseconds, and the reasons why other candidates have none."""
    ms_of: dict[int, float] = {}
    reasons: list[str] = []
    expected = None
    for number, candidate in enumerate(tuned.tried):
        tuned.table.candidate = candidate
        try:
            result = tuned.call().float()
            expected = result if expected is None else expected
            error = float((result - expected).norm() / expected.norm().clamp(min=1e-30))
            if not error <= TOLERANCE:
                reasons.append(f"{candidate}: differs from the first by {error:.1e}")
                continue
            ms_of[number] = measure(tuned.call, context, seconds=0.05).median
        except Exception as error:  # from the compiler: too many registers, too much shared memory
            if is_of_cuda(error):
                raise
            reasons.append(" ".join(f"{candidate}: {type(error).__name__}: {error}".split())[:200])
    return ms_of, reasons


def compile_ahead(context: Context) -> dict[str, Any]:
    """Compile all candidates in several processes; an error occurs again when a candidate is timed.

    Raises:
        Failure: if a process ended by itself with an exit code other than 0.
    """
    processes = context.choose(max((os.cpu_count() or 2) - 2, 1), 1)
    words = [sys.executable, "-m", "benchmarks.gpu.sections.tune"]
    deadline = time.monotonic() + context.left * COMPILING
    children = [
        subprocess.Popen([*words, str(n), str(processes), *["--dry-run"] * context.dry])
        for n in range(processes)
    ]
    crashed, stopped = [], 0
    for process in children:
        try:
            code = process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            stopped += 1
        else:
            crashed += [code] * bool(code)
    if crashed:
        raise Failure(f"{len(crashed)} of {processes} processes crashed, with exit codes {crashed}")
    return {"processes": processes, "stopped_by_time": stopped}


def compile_share(number: int, processes: int, *, dry: bool) -> None:
    """Compile every n-th candidate, in one of these processes, instead of launching it."""
    context = Context(dry=dry, out=Path(), scratch=Path(), deadline=float("inf"))
    count = 0
    with handed_to(warm_up):
        for job in jobs(context):
            try:
                with opened(job, context) as tuned:
                    for candidate in tuned.tried:
                        count += 1
                        if count % processes == number:
                            tuned.table.candidate = candidate
                            _compile(tuned)
            except NotHere as reason:
                print(f"{job.name}: {reason}", flush=True)
    if not dry:
        torch.cuda.synchronize()


def warm_up(start: Start) -> None:
    """Compile the kernel of a launch into Triton's cache, where the real launch looks it up."""
    start.kernel.warmup(
        grid=(start.programs,), num_warps=start.warps, num_stages=start.stages, **start.arguments
    )


def _compile(tuned: Tuned) -> None:
    try:
        tuned.call()
    except Exception as error:  # from the compiler
        print(f"{tuned.table.candidate}: {type(error).__name__}: {error}"[:300], flush=True)


def add(entry: dict[str, Any], path: Path) -> None:
    """Add an entry to a JSON list, and rewrite the file."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps([*entries, entry], indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    importlib.import_module("megatron_sffn.utils.warning_filters").silence()
    compile_share(int(sys.argv[1]), int(sys.argv[2]), dry="--dry-run" in sys.argv)
