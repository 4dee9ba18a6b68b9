"""The pretraining command starts as a single process or as a rank of a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sffn import pretrain
from tests.support.processes import HANGS

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("variable", pretrain.WORLD_SIZES)
def test_processes_of_another_launcher_are_refused(tmp_path: Path, variable: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_sffn.pretrain", "--save", "run"],
            cwd=tmp_path,
            env={**environment, variable: "2", "SLURM_PROCID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=HANGS)
        assert process.returncode == 2
        assert stderr.startswith(f"error: {variable}=2 says that "), stderr
        assert "torchrun, which makes them one job, is missing" in stderr
        assert stderr.endswith(f"env -u {variable} python -m megatron_sffn.pretrain ...\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", pretrain.WORLD_SIZES)
@pytest.mark.parametrize(("rank", "processes"), [("1", "2"), (None, "1"), (None, "")])
def test_a_single_process_and_ranks_of_torchrun_can_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, rank: str | None, processes: str
) -> None:
    for name in WORLD:
        monkeypatch.setenv(name, rank or "unset")  # so that pytest restores it
    if rank is None:
        del os.environ["RANK"]
    monkeypatch.setenv(variable, processes)
    pretrain.one_rank_without_torchrun()
    assert os.environ["RANK"] == (rank or "0")
    assert os.environ["WORLD_SIZE"] == (rank or "1")
