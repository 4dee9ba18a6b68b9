"""Run the tests in as many pytest processes as there are processors, four at most.

Inputs: flags of pytest. Outputs: the report of each process, one below the other; exit code 1 if
any test failed. The first process reports while it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack

MOST_PROCESSES = 4
"""Each may start eight ranks."""


def main() -> int:
    """Start the processes, wait for all of them, and print what they reported."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.shared_run", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as claims, ExitStack() as stack:
        processes, reports = [], []
        for process in range(min(MOST_PROCESSES, os.cpu_count() or 1)):
            environment = {"SHARED_RUN": claims, "SHARED_RUN_PROCESS": str(process)}
            report = stack.enter_context(tempfile.TemporaryFile("w+")) if process else None
            reports.append(report)
            processes.append(
                subprocess.Popen(command, env={**os.environ, **environment}, stdout=report)
            )
        try:
            codes = [process.wait() for process in processes]
        except KeyboardInterrupt:
            codes = [process.wait() for process in processes]  # Ctrl-C has reached all of them
        for report in filter(None, reports):
            report.seek(0)
            print(report.read(), flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
