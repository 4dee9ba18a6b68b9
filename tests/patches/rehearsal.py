"""Simulate a CUDA machine on the CPU, to test what the package does on one.

The names of `torch.cuda` answer for the CPU (`patches/cpu.py`), and the package is told that this
is a CUDA machine with an H100: it takes its CUDA branches, and replaces only what it replaces on
every machine. Collectives go over gloo, which the command line has to request.

Inputs: a line of JSON per run on stdin, `{"ranks": 2, "flags": [...], "folder": ..., "without":
target or null}`; `without` names a replacement that is left out. Outputs: a line of JSON per run on
stdout, `{"code": exit code of the first rank that failed or 0, null if the ranks hung; "log": of
the last or failed rank}`.

It is a program of its own because the replacements are made once per process: every run is forked
from a process that has imported Megatron and replaced nothing but the device.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.cuda_operators import CUDA_OPERATORS
from tests.support.processes import HANGS, free_port


def simulate_cuda_machine() -> None:
    """Make this process take itself for one with a GPU."""
    from megatron_sffn.patches import cpu

    cpu.install()
    cpu.is_host = lambda: False  # before any module imports the name

    from tests.support.simulated_gpu import simulate_gpu

    assert CUDA_OPERATORS
    simulate_gpu(pytest.MonkeyPatch())

    import megatron.core.tokenizers.text
    import megatron.training  # noqa: F401  (seconds that no forked rank has to spend)


def leave_out(target: str) -> None:
    """Take a replacement out of the tables for every machine."""
    from megatron_sffn.patches import megatron, optimizer

    assert target in [patch.target for patch in (*megatron.PATCHES, *optimizer.PATCHES)], target
    for module in (megatron, optimizer):
        module.PATCHES = tuple(patch for patch in module.PATCHES if patch.target != target)


def run(ranks: int, flags: list[str], folder: str, without: str | None) -> dict[str, Any]:
    """Pretrain in forked ranks."""
    port = free_port()
    logs = [Path(folder) / f"rehearsal{rank}.log" for rank in range(ranks)]
    children = {}
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in world.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            rank_main(flags, folder, log, without)
        children[pid] = rank
    code, failed_rank = wait(children)
    return {
        "code": code,
        "log": logs[ranks - 1 if failed_rank is None else failed_rank].read_text(),
    }


def wait(children: dict[int, int]) -> tuple[int | None, int | None]:
    """Wait for all ranks; if one fails, end the others and return its exit code and number.

    After `HANGS` seconds the exit code is None.
    """
    deadline = time.monotonic() + HANGS
    failed: tuple[int | None, int | None] = (0, None)
    while children and failed[1] is None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            rank = children.pop(pid)
            failed = (os.waitstatus_to_exitcode(status), rank) if status else failed
        elif time.monotonic() > deadline:
            failed = (None, next(iter(children.values())))
        else:
            time.sleep(0.01)
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return failed


def rank_main(flags: list[str], folder: str, log: Path, without: str | None) -> None:
    """Pretrain in a forked rank; does not return."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["pretrain", *flags]
    code = 1
    try:
        from megatron_sffn.pretrain import main
        from megatron_sffn.utils.errors import run_command

        if without is not None:
            leave_out(without)
        run_command(main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    simulate_cuda_machine()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
