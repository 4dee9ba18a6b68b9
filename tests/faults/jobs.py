"""Real runs that can be killed, stopped and signalled: a process per rank, with a log of its own.

Megatron is imported once, in the parent; a rank is forked from it and starts in 0.1 s.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_sffn.pretrain import main
from megatron_sffn.utils.errors import run_command
from tests.support import ranks
from tests.support.paths import ROOT
from tests.support.pretraining import MODEL
from tests.support.processes import HANGS, free_port, kill_all, wait_until

EP2 = "--expert-model-parallel-size 2"
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For torchrun, whose ranks otherwise find the addresses of killed ones after a restart."""

FLAGS = f"{MODEL} --mock-data --split 90,10,0"


@dataclass
class Job:
    """Ranks that run.

    Args:
        folder: of the logs.
        pids: of the ranks, each the first of a process group.
    """

    folder: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def log(self, rank: int = -1) -> str:
        """What a rank has printed; the last one prints Megatron's progress lines."""
        path = self.folder / f"log{range(len(self.pids))[rank]}"
        return path.read_text() if path.exists() else ""

    def wait_for(self, pattern: str, rank: int = -1, seconds: float = HANGS) -> None:
        """Wait until a rank has printed something."""
        wait_until(lambda: bool(re.search(pattern, self.log(rank))), seconds, self.log)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all, and to the processes that they have started."""
        for one, pid in enumerate(self.pids):
            if one not in self.codes and rank in (None, one):
                os.killpg(pid, number)

    def wait(self, seconds: float = HANGS, rank: int | None = None) -> list[int]:
        """Exit codes of a rank, or of all; that of a signal is its number, negative."""
        chosen = list(range(len(self.pids))) if rank is None else [rank]
        wait_until(lambda: self._have_ended(chosen), seconds, self.log)
        return [self.codes[one] for one in chosen]

    def runs(self) -> bool:
        """Whether a rank still runs."""
        return not self._have_ended(list(range(len(self.pids))))

    def _have_ended(self, chosen: list[int]) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return all(rank in self.codes for rank in chosen)


@contextlib.contextmanager
def job(num_ranks: int, flags: str, folder: Path) -> Iterator[Job]:
    """Start the command; what still runs when the block ends is killed.

    Args:
        num_ranks: of the job.
        flags: beside `FLAGS`.
        folder: of the logs, and the working directory.
    """
    assert ranks.FORKS_ARE_SAFE, "gloo's threads do not survive a fork: this test must run earlier"
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pids = []
    for rank in range(num_ranks):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        pid = os.fork()
        if pid == 0:
            _rank(flags, folder, {name: str(value) for name, value in world.items()})
        # Done here, too, so that it is done before the first signal.
        os.setpgid(pid, pid)
        pids.append(pid)
    running = Job(folder=folder, pids=pids)
    try:
        yield running
    finally:
        running.send(signal.SIGKILL)
        running.wait()


class Agent:
    """The command under torchrun, on 2 ranks; what still runs when the block ends is killed.

    Args:
        flags: beside `FLAGS`.
        folder: of the log, and the working directory.
        options: of torchrun.
    """

    def __init__(self, flags: str, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
        command += ["--nproc-per-node", "2", "-m", "megatron_sffn.pretrain"]
        folder.mkdir(exist_ok=True)
        self.path = folder / "torchrun.log"
        with self.path.open("w") as output:
            self.process = psutil.Popen(
                [*command, *shlex.split(f"{FLAGS} {flags}")],
                cwd=folder,
                env={**os.environ, **RESTARTS, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *error: object) -> None:
        kill_all(self.process)

    def log(self) -> str:
        """What torchrun and the ranks have printed."""
        return self.path.read_text()

    def wait_for(self, pattern: str) -> None:
        """Wait until somebody has printed something."""
        wait_until(lambda: bool(re.search(pattern, self.log())), HANGS, self.log)

    def wait(self) -> int:
        """Exit code of torchrun."""
        return int(self.process.wait(HANGS))

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks, in no order."""
        return [one for one in self.process.children() if "megatron_sffn.pretrain" in one.cmdline()]


def _rank(flags: str, folder: Path, world: dict[str, str]) -> NoReturn:
    """A forked rank: the command, as a process of its own would run it."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(folder / f"log{world['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(world, MASTER_ADDR="127.0.0.1")
        os.chdir(folder)
        # The command's own filters and handlers count here, not pytest's.
        warnings.simplefilter("ignore")
        logging.getLogger().handlers.clear()
        sys.argv = ["pretrain", *shlex.split(f"{FLAGS} {flags}")]
        run_command(main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Neither pytest's nor torch's exit handlers belong to a forked rank; but then nobody else
        # ends the processes that Megatron's checkpoint writer has started.
        for process in multiprocessing.active_children():
            process.terminate()
        os._exit(code)


class SmallDisk:
    """A small disk in memory, for as long as the block.

    Args:
        folder: where it is.
        size: in bytes.

    Raises:
        PermissionError: if this process may not mount one.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir()
        self._mount(f"size={self.size}")
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def grow(self, size: int) -> None:
        """Give it another size."""
        self._mount(f"remount,size={size}")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(done.stderr)


def column(log: str, name: str) -> dict[int, str]:
    """What the progress lines say of each step under a name, such as `grad norm`."""
    found = re.findall(rf"iteration +(\d+)/.*? {name}: +(\S+) \|", log)
    return {int(iteration): value for iteration, value in found}


def validation_loss(log: str) -> str:
    """Of the evaluation at the end of the run."""
    return re.findall(r"on validation set \| lm loss value: (\S+)", log)[-1]
