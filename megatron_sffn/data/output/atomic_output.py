"""Files that appear together, complete, or not at all, where starting anew costs little.

Enters: the paths that a tool is to write. Leaves: the files under these names, once all are whole.
Choice: the folder, lock and renames of `run_state.py`, which tools that work for hours go on from.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_sffn.data.output.run_state import RunState, State
from megatron_sffn.utils.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk without room says."""


@contextmanager
def atomic_output(prefix: str, files: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """A folder in which to write `files`, which get their places when the block has ended.

    Args:
        prefix: path and first part of the name of all of them.
        files: in the order in which they get their places.
        overwrite: replace those that are there.

    Raises:
        ConfigError: a file is there and may not be replaced, their folder does not exist, cannot be
            written or is full, or another run writes them. Nothing is left then.
    """
    folder = Path(prefix).parent
    if not folder.is_dir():
        raise ConfigError(
            f"--output-prefix {prefix} lies in {folder}, which is no folder; create it first"
        )
    # A name and a time of its own: the work of another tool or run is neither removed nor taken up.
    command = {"started": time.time_ns()}
    run_state = RunState(str(files[0]), list(files), command, lambda message: None)
    try:
        # First, because it ends the renames among which a run was killed.
        run_state.resume(repeatable=False)
        if not overwrite:
            refuse_existing(files)
        yield run_state.folder
        run_state.finish(State())
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"{folder} has no room for {files[0].name} ({error.strerror}); free some, or give "
            "another --output-prefix"
        ) from error
    finally:
        run_state.saved = False
        run_state.close()


def refuse_existing(files: Sequence[Path]) -> None:
    """Refuse to replace files.

    Raises:
        ConfigError: one of them is there.
    """
    for path in files:
        if path.exists():
            raise ConfigError(
                f"{path} is there already; add --overwrite to replace it, or give another "
                "--output-prefix"
            )


def bin_and_idx(prefix: str) -> list[Path]:
    """The files of a data set; a reader finds both, or no index."""
    return [Path(prefix + ".bin"), Path(prefix + ".idx")]
