"""compute-sanitizer over one small case of every kernel: memory errors and races.

Outputs: sanitizer.txt, all that it said. Where it is not installed the cases count as skipped; a
dry run then starts the watched program alone, to know that it starts.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure, NotHere
from benchmarks.gpu.small import ROUTE

TOOLS = ("memcheck", "racecheck")
ERROR = 86
"""Exit code that the tool is asked for where it finds an error."""

SECONDS = 60
"""Of one program under the tool."""


def cases(context: Context) -> list[Case]:
    """Each kernel module under each tool; in a dry run one."""
    targets = [name for name in forms.modules() if name.startswith("triton_")] + [ROUTE]
    found = [
        Case(name=f"{tool} {name}", run=functools.partial(watch, tool, name, context))
        for tool in TOOLS
        for name in targets
    ]
    return found[: context.choose(len(found), 1)]


def watch(tool: str, name: str, context: Context) -> dict[str, Any]:
    """Run the small case of a module under a tool."""
    program = [sys.executable, "-m", "benchmarks.gpu.small", name]
    path = shutil.which("compute-sanitizer")
    if path is None and not context.dry:
        raise NotHere("compute-sanitizer is not installed (it is part of the CUDA toolkit)")
    watcher = [path, "--tool", tool, "--error-exitcode", str(ERROR)] if path else []
    if context.dry:
        program += ["--tokens", "3", "--width", "16", "--active", "16"]
    done = subprocess.run(
        [*watcher, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    with (context.out / "sanitizer.txt").open("a", encoding="utf-8") as file:
        file.write(f"==== {tool} {name}: exit code {done.returncode}\n{done.stdout[-20000:]}\n")
    if done.returncode == ERROR:
        errors = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        raise Failure(f"{tool} found errors: {' '.join(errors[:2])}")
    if done.returncode:
        last = (done.stdout.strip() or "no output").splitlines()[-1]
        if path and "Error:" not in done.stdout:
            # A container may forbid what the tool needs.
            raise NotHere(f"{tool} does not run here: {last}")
        raise Failure(f"the program ended with exit code {done.returncode}: {last}")
    if path is None:
        raise NotHere("compute-sanitizer is not installed; the program it would watch runs")
    return {}
