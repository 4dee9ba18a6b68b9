"""Run the tests in as many pytest processes as there are processors, four at most.

Inputs: flags of pytest. Outputs: the report of each process, one below the other; exit code 1 if
any test failed. The first process reports while it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MOST_PROCESSES = 4
"""Each may start eight ranks."""


def main() -> int:
    """Start the processes, wait for all of them, and print what they reported."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.shared_run", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as name:
        claims = Path(name, "claims")
        claims.mkdir()
        environment = {**os.environ, "SHARED_RUN": str(claims)}
        reports = [Path(name, f"report{index}") for index in range(1, count)]
        processes = [subprocess.Popen(command, env=environment)]
        for report in reports:
            with report.open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output))
        try:
            codes = [process.wait() for process in processes]
        except KeyboardInterrupt:
            # Ctrl-C has reached every process.
            codes = [process.wait() for process in processes]
        for report in reports:
            print(report.read_text(), flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
