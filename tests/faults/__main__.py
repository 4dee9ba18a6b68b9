"""The fault table: `python -m tests.faults [--kills 30] [--folder DIR]`.

Causes the faults of the tests in real runs and prints what each one cost, in about 5 minutes on 2
cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> int:
    """Print the table; the exit code is the number of faults that a run did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=30, help="number of kills of the job (default: 30)"
    )
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary one)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from megatron_sffn.patches import prepare

    prepare()

    from tests.faults import scenarios

    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = args.folder or Path(temporary_folder)
        undisturbed_job = scenarios.undisturbed(folder / "undisturbed")
        faults: dict[str, tuple[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
            "SIGKILL of the job": (
                args.kills,
                scenarios.killed_job,
                (undisturbed_job,),
                {"kills": args.kills, "seed": 1},
            ),
            "SIGKILL of a rank": (1, scenarios.killed_rank, (undisturbed_job,), {}),
            **{
                f"{number.name} to the ranks": (
                    1,
                    scenarios.asked_to_stop,
                    (undisturbed_job, number),
                    {},
                )
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            },
            "SIGTERM to torchrun": (1, scenarios.torchrun_asked_to_stop, (), {}),
            "full disk": (1, scenarios.full_disk, (undisturbed_job,), {}),
            "failing write": (1, scenarios.failing_write, (undisturbed_job,), {}),
            "rank 1 hangs": (1, scenarios.hung_rank, (1,), {}),
            "rank 0 hangs": (1, scenarios.hung_rank, (0,), {}),
        }
        print(f"{'fault':<22}{'tries':>6}{'survived':>10}{'lost steps':>12}  ", flush=True)
        failed = 0
        for name, (tries, scenario, arguments, options) in faults.items():
            try:
                outcome = scenario(folder / name.replace(" ", "-"), *arguments, **options)
            except (AssertionError, PermissionError) as error:
                failed += 1
                print(f"{name:<22}{tries:>6}{'no':>10}{'':>12}  {error}", flush=True)
            else:
                row = f"{name:<22}{tries:>6}{tries:>10}{outcome.lost:>12}  {outcome.note}"
                print(row, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
