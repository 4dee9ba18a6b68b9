"""Runs a program alone, then under a tool that watches it, to distinguish their errors.

Inputs: the program's arguments, the tool's command. Outputs: the result of the run under the tool.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.gpu.case import Context, Failure, NotHere
from benchmarks.gpu.worker import LONGEST_CASE

SHARE = 0.9 * LONGEST_CASE
"""Share of the remaining time for both runs: a case that takes `LONGEST_CASE` of it is stopped."""

_passed_alone: set[tuple[str, ...]] = set()
"""Programs that this process has run without a tool successfully."""


def watched(
    tool: str, watcher: list[str], small: tuple[str, ...], context: Context
) -> subprocess.CompletedProcess[str]:
    """Run `benchmarks.gpu.small` alone, then under a tool.

    Args:
        tool: name.
        watcher: the tool's command; empty if it is not installed.
        small: arguments of the program.
        context: context of the section.

    Raises:
        Failure: if the program fails without the tool.
        NotHere: if the tool is not installed, or takes too long.
    """
    deadline = time.monotonic() + SHARE * context.left
    words = (sys.executable, "-m", "benchmarks.gpu.small", *small)
    if watcher or context.dry:
        run_alone(words, deadline - time.monotonic())
    if not watcher:
        program = "; the program it would watch runs" if context.dry else ""
        raise NotHere(f"{tool} is not installed (it is part of the CUDA toolkit){program}")
    try:
        return run((*watcher, *words), max(deadline - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired as error:
        raise NotHere(f"under {tool} the program takes more than {error.timeout:.0f} s") from None


def run_alone(words: tuple[str, ...], seconds: float) -> None:
    """Run the program without a tool, once for all tools."""
    if words in _passed_alone:
        return
    try:
        result = run(words, seconds)
    except subprocess.TimeoutExpired:
        raise Failure(f"the program takes more than {seconds:.0f} s without a tool") from None
    if result.returncode:
        last_line = (result.stdout.strip() or "no output").splitlines()[-1]
        raise Failure(
            f"the program ends with exit code {result.returncode} without a tool: {last_line}"
        )
    _passed_alone.add(words)


def run(words: tuple[str, ...], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program; the output contains its errors too."""
    return subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
