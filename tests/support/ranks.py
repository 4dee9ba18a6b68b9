"""Runs a function on several ranks: forked processes that meet at a TCP store.

A fork starts in 0.1 s, because Megatron is imported once, in the parent.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tests.support.processes import HANGS, free_port

FORKS_ARE_SAFE = True
"""Until this process starts a process group of its own (see tests/conftest.py)."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, **layout: int | None
) -> list[Any]:
    """Call `function(*args)` on every rank.

    Args:
        world_size: number of ranks.
        function: may use torch.distributed and Megatron's parallel state.
        args: for the function.
        layout: arguments of `initialize_model_parallel`.

    Returns:
        The results of all ranks, in the order of ranks; they must be picklable.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or that hung.
    """

    port = free_port()

    def body(rank: int, folder: Path) -> Any:
        store = torch.distributed.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
        torch.distributed.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=HANGS),
        )
        parallel_state.initialize_model_parallel(**layout)
        model_parallel_cuda_manual_seed(1)
        return function(*args)

    return fork(world_size, body)


def fork(world_size: int, body: Callable[[int, Path], Any]) -> list[Any]:
    """Call `body(rank, folder)` in forked processes and collect the results."""
    assert FORKS_ARE_SAFE, "gloo's threads do not survive a fork: this test must run earlier"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = {}
        sys.stdout.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, folder, body)
            children[pid] = rank
        _wait(children, folder)
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _child(rank: int, folder: Path, body: Callable[[int, Path], Any]) -> None:
    code = 1
    try:
        # Renews torch's thread pool, which a fork spoils, before several threads need it at once.
        torch.set_num_threads(torch.get_num_threads())
        result = body(rank, folder)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as stop:
        (folder / f"error{rank}").write_text(f"exit code {stop.code}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        # Neither pytest's nor torch's exit handlers belong to a forked rank; but then nobody else
        # ends the processes that Megatron's checkpoint writer has started.
        for process in multiprocessing.active_children():
            process.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: dict[int, int], folder: Path) -> None:
    deadline = time.monotonic() + HANGS
    failed = None
    while children and failed is None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            rank = children.pop(pid)
            if status:
                failed = rank
        elif time.monotonic() > deadline:
            failed = next(iter(children.values()))
            (folder / f"error{failed}").write_text(f"hung for {HANGS} s")
        else:
            time.sleep(0.005)
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    if failed is not None:
        error = folder / f"error{failed}"
        raise AssertionError(f"rank {failed}: {error.read_text() if error.exists() else 'killed'}")
