"""Real runs that can be killed, stopped and signalled: one process and one log per rank.

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
"""Environment of torchrun; without it, restarted ranks find the addresses of killed ranks."""

FLAGS = f"{MODEL} --mock-data --split 90,10,0"


@dataclass
class Job:
    """The ranks of a run.

    Args:
        folder: of the logs.
        pids: of the ranks, each the first of a process group.
    """

    folder: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def log(self, rank: int = -1) -> str:
        """The output of a rank; the last rank prints Megatron's progress lines."""
        path = self.folder / f"log{range(len(self.pids))[rank]}"
        return path.read_text() if path.exists() else ""

    def wait_for(self, pattern: str, rank: int = -1, seconds: float = HANGS) -> None:
        """Wait until the log of a rank matches a pattern.

        Raises:
            AssertionError: all ranks have ended, or time is over, and no line matches.
        """

        def matches() -> bool:
            over = not self.runs()  # before the log is read: a rank may write its last lines here
            found = bool(re.search(pattern, self.log(rank)))
            assert found or not over, f"the ranks ended without {pattern!r}:\n{self.log()[-3000:]}"
            return found

        wait_until(matches, seconds, self.log)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank or all ranks, and to the processes that they have started."""
        for index, pid in enumerate(self.pids):
            if index not in self.codes and rank in (None, index):
                os.killpg(pid, number)

    def wait(self, seconds: float = HANGS, rank: int | None = None) -> list[int]:
        """Wait for one rank or all ranks; returns exit codes, for a signal its negative number."""
        waited_ranks = list(range(len(self.pids))) if rank is None else [rank]
        wait_until(lambda: self._have_ended(waited_ranks), seconds, self.log)
        return [self.codes[index] for index in waited_ranks]

    def runs(self) -> bool:
        """True while a rank runs."""
        return not self._have_ended(list(range(len(self.pids))))

    def _have_ended(self, waited_ranks: list[int]) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended_pid, status = os.waitpid(pid, os.WNOHANG)
                if ended_pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return all(rank in self.codes for rank in waited_ranks)


@contextlib.contextmanager
def job(num_ranks: int, flags: str, folder: Path) -> Iterator[Job]:
    """Start the command; ranks that still run when the block ends are killed.

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
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "MASTER_PORT": port,
        }
        pid = os.fork()
        if pid == 0:
            _run_rank(flags, folder, {name: str(value) for name, value in environment.items()})
        # The parent sets the group, too, so that it exists before the first signal.
        os.setpgid(pid, pid)
        pids.append(pid)
    running = Job(folder=folder, pids=pids)
    try:
        yield running
    finally:
        running.send(signal.SIGKILL)
        running.wait()


class Agent:
    """The command under torchrun on 2 ranks; processes that still run at the end are killed.

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
        """The output of torchrun and the ranks."""
        return self.path.read_text()

    def wait_for(self, pattern: str) -> None:
        """Wait until the log matches a pattern."""
        wait_until(lambda: bool(re.search(pattern, self.log())), HANGS, self.log)

    def wait(self) -> int:
        """Exit code of torchrun."""
        return int(self.process.wait(HANGS))

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks, in no order."""
        return [
            process
            for process in self.process.children()
            if "megatron_sffn.pretrain" in process.cmdline()
        ]


def _run_rank(flags: str, folder: Path, environment: dict[str, str]) -> NoReturn:
    """Run the command in a forked rank as in a new process."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(
            folder / f"log{environment['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        )
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment, MASTER_ADDR="127.0.0.1")
        os.chdir(folder)
        # The filters and handlers of the command apply, not those of pytest.
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
        # A forked rank must not run the exit handlers of pytest and torch, so it has to end the
        # processes of Megatron's checkpoint writer itself.
        for process in multiprocessing.active_children():
            process.terminate()
        os._exit(code)


class SmallDisk:
    """A small disk in memory, which exists inside a `with` block.

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
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise PermissionError(process.stderr)


def progress_column(log: str, name: str) -> dict[int, str]:
    """Step -> the value with a name, such as `grad norm`, in its progress line."""
    matches = re.findall(rf"iteration +(\d+)/.*? {name}: +(\S+) \|", log)
    return {int(iteration): value for iteration, value in matches}


def validation_loss(log: str) -> str:
    """The validation loss of the evaluation at the end of the run."""
    return re.findall(r"on validation set \| lm loss value: (\S+)", log)[-1]
