"""Run compute-sanitizer over one small case of every kernel, for memory errors and races.

Outputs: sanitizer.txt, its whole output. If it is not installed, does not run or takes too long,
the cases count as skipped; a dry run then starts the program without it.
"""

from __future__ import annotations

import functools
import re
import shutil
from typing import Any

from benchmarks.gpu.case import Case, Context, Failure, NotHere
from benchmarks.gpu.small import CHUNKED, targets
from benchmarks.gpu.watched import watched

TOOLS = ("memcheck", "racecheck")

ERROR = 86
"""Exit code that the tool returns if it finds an error although the program succeeds."""


def cases(context: Context) -> list[Case]:
    """Each target under each tool; one case in a dry run."""
    all_cases = [
        Case(name=f"{tool} {name}", run=functools.partial(watch, tool, name, context))
        for tool in TOOLS
        for name in targets()
    ]
    return all_cases[: context.choose(len(all_cases), 1)]


def watch(tool: str, name: str, context: Context) -> dict[str, Any]:
    """Run the small case of a target under a tool."""
    path = shutil.which("compute-sanitizer")
    watcher = [path, "--tool", tool, "--error-exitcode", str(ERROR)] if path else []
    size = context.choose(CHUNKED, ("--tokens", "3", "--width", "16", "--active", "16"))
    result = watched("compute-sanitizer", watcher, (name, *size), context)
    with (context.out / "sanitizer.txt").open("a", encoding="utf-8") as file:
        file.write(f"==== {tool} {name}: exit code {result.returncode}\n{result.stdout[-20000:]}\n")
    # An illegal access makes the program fail; then the tool returns the program's exit code.
    if result.returncode == ERROR or re.search(r"SUMMARY: [1-9]", result.stdout):
        errors = [line for line in result.stdout.splitlines() if line.startswith("=========")]
        raise Failure(f"{tool} found errors: {' '.join(errors[:2])}")
    if result.returncode:
        # The program runs without the tool, so the container may forbid what the tool needs.
        last_line = (result.stdout.strip() or "no output").splitlines()[-1]
        raise NotHere(f"{tool} does not run here: {last_line}")
    return {}
