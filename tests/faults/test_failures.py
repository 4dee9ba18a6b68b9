"""A rank that fails: its process ends, whatever it has started, and torchrun says why last."""

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

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.parametrize(("launcher", "raising", "ranks"), [("", "0", 1), (TORCHRUN, "1", 2)])
def test_a_failing_rank_ends_with_its_data_workers(
    tmp_path: Path, launcher: str, raising: str, ranks: int
) -> None:
    flags = f"{FLAGS} --num-workers 2 --train-iters 6 --global-batch-size {4 * ranks}"
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    done = subprocess.run(
        [sys.executable, *shlex.split(f"{launcher} -m tests.faults.raising {flags}")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "RAISING_RANKS": raising},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    last = [line for line in done.stdout.splitlines() if not line.startswith("=")][-1]
    assert last.endswith(f"RuntimeError: {SENTENCE}"), done.stdout
    if launcher:
        # The other rank fails because this one has left, often within the same second.
        root_cause = done.stdout.rpartition("Root Cause")[2]
        assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 1 ", root_cause), root_cause
