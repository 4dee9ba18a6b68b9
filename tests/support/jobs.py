"""Runs a command in forked ranks with the environment of torchrun, and keeps what they print."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import free_port
from tests.support.ranks import fork


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one rank printed and returned.

    Args:
        stdout: and stderr, if they were merged.
        stderr: empty if they were merged.
        result: of the function; must be picklable.
    """

    stdout: str
    stderr: str
    result: Any


def run_as_job(
    ranks: int,
    body: Callable[[], Any],
    *,
    folder: Path,
    merge: bool = False,
    stdin: str = "",
) -> list[Output]:
    """Call `body()` on every rank of a job.

    Args:
        ranks: number of them.
        body: may start Megatron.
        folder: the working directory.
        merge: keep stdout and stderr in one text.
        stdin: standard input of every rank.

    Raises:
        AssertionError: with the traceback and the output of the first rank that failed.
    """
    port = free_port()

    def on_rank(rank: int, results: Path) -> Output:
        # The filters of the command apply, not those of pytest.
        warnings.simplefilter("ignore")
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        os.chdir(folder)
        (results / f"in{rank}").write_text(stdin)
        os.dup2(os.open(results / f"in{rank}", os.O_RDONLY), 0)
        paths = [results / f"out{rank}", results / f"{'out' if merge else 'err'}{rank}"]
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        for descriptor, path in enumerate(paths, 1):
            os.dup2(os.open(path, flags), descriptor)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")

        def printed() -> list[str]:
            sys.stdout.flush()
            sys.stderr.flush()
            return [path.read_text() for path in paths]

        result = None
        try:
            result = body()
        except SystemExit as stop:
            # Megatron leaves this way at --exit-interval and on signals.
            assert not stop.code, stop.code
        except BaseException as error:
            text = "\n".join(printed())
            raise RuntimeError(f"{type(error).__name__}: {error}\n{text[-3000:]}") from error
        stdout, stderr = printed()
        return Output(stdout=stdout, stderr="" if merge else stderr, result=result)

    outputs: list[Output] = fork(ranks, on_rank)
    return outputs
