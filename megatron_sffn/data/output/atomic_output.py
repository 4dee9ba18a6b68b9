"""Atomic output: several files that appear together and complete, or not at all.

Design notes:
- Folder, lock and renames are those of `run_state.py`, without resume: a killed run starts anew.
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
"""Error numbers of a full disk."""


@contextmanager
def atomic_output(prefix: str, files: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """A folder in which to write `files`, which are renamed when the `with` block ends.

    Args:
        prefix: path and first part of the name of all files.
        files: final paths, in the order of the renames.
        overwrite: replace existing files.

    Raises:
        ConfigError: a file exists and may not be replaced, their folder does not exist, cannot be
            written or is full, or another run writes the files. No partial file is left.
    """
    folder = Path(prefix).parent
    if not folder.is_dir():
        raise ConfigError(
            f"--output-prefix {prefix} lies in {folder}, which is no folder; create it first"
        )
    # The first file names the folder and the time is unique, so that this run neither removes nor
    # resumes the work of another tool or run.
    command = {"started": time.time_ns()}
    run_state = RunState(str(files[0]), list(files), command, lambda message: None)
    try:
        # Before the check for existing files: it completes the renames of a killed run.
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
        ConfigError: one of the files exists.
    """
    for path in files:
        if path.exists():
            raise ConfigError(
                f"{path} is there already; add --overwrite to replace it, or give another "
                "--output-prefix"
            )


def bin_and_idx(prefix: str) -> list[Path]:
    """The files of a data set, in the order of the renames: no index appears before its ids."""
    return [Path(prefix + ".bin"), Path(prefix + ".idx")]
