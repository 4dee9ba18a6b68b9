"""The benchmark of the routing statistics runs and prints percentages."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.paths import ROOT
from tests.support.processes import HANGS


def test_the_benchmark_prints_the_overhead_in_percent() -> None:
    flags = "--tokens 16 --hidden-size 8 --active-cells 8 --block-sizes 4 1 --repeats 2"
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.routing_overhead", *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines()[4:]]
    assert [row[:4] for row in rows] == [
        ["4", "16", "2", "avg-k"],
        ["4", "16", "2", "switch"],
        ["1", "64", "8", "avg-k"],
        ["1", "64", "8", "switch"],
    ]
    assert all(re.fullmatch(r"\d+\.\d\d%", row[5]) for row in rows)
