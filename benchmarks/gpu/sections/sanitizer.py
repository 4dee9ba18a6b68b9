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
    everything = [
        Case(name=f"{tool} {name}", run=functools.partial(watch, tool, name, context))
        for tool in TOOLS
        for name in targets()
    ]
    return everything[: context.choose(len(everything), 1)]


def watch(tool: str, name: str, context: Context) -> dict[str, Any]:
    """Run the small case of a target under a tool."""
    path = shutil.which("compute-sanitizer")
    watcher = [path, "--tool", tool, "--error-exitcode", str(ERROR)] if path else []
    size = context.choose(CHUNKED, ("--tokens", "3", "--width", "16", "--active", "16"))
    done = watched("compute-sanitizer", watcher, (name, *size), context)
    with (context.out / "sanitizer.txt").open("a", encoding="utf-8") as file:
        file.write(f"==== {tool} {name}: exit code {done.returncode}\n{done.stdout[-20000:]}\n")
    # An illegal access makes the program fail; then the tool returns the program's exit code.
    if done.returncode == ERROR or re.search(r"SUMMARY: [1-9]", done.stdout):
        errors = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        raise Failure(f"{tool} found errors: {' '.join(errors[:2])}")
    if done.returncode:
        # The program runs without the tool, so the container may forbid what the tool needs.
        last = (done.stdout.strip() or "no output").splitlines()[-1]
        raise NotHere(f"{tool} does not run here: {last}")
    return {}
