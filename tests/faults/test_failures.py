"""A rank fails: it ends with its child processes, and torchrun reports the root cause."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.jobs import FLAGS, ROOT
from tests.faults.raising import SENTENCE
from tests.support.processes import HANGS
from tests.support.slow import slow

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.parametrize(
    ("launcher", "raising_ranks", "num_ranks"), [slow("", "0", 1), (TORCHRUN, "1", 2)]
)
def test_a_failing_rank_ends_its_data_workers_and_torchrun_names_the_rank(
    tmp_path: Path, launcher: str, raising_ranks: str, num_ranks: int
) -> None:
    flags = f"{FLAGS} --num-workers 2 --train-iters 6 --global-batch-size {4 * num_ranks}"
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    process = subprocess.run(
        [sys.executable, *shlex.split(f"{launcher} -m tests.faults.raising {flags}")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "RAISING_RANKS": raising_ranks},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert process.returncode == 1, process.stdout
    last_line = [line for line in process.stdout.splitlines() if not line.startswith("=")][-1]
    assert last_line.endswith(f"RuntimeError: {SENTENCE}"), process.stdout
    if launcher:
        # The other rank fails, too, because its peer has ended, often within the same second.
        root_cause = process.stdout.rpartition("Root Cause")[2]
        assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 1 ", root_cause), root_cause
