"""The state of a run that writes files for hours, from which a killed run resumes.

Inputs: the files that a run writes, and the command that determines them. Outputs: the files under
their names, all complete; or, after a kill, the folder `PREFIX.partial`, where `journal.json` has
the positions in input and output at the last save.

Design notes:
- The same command resumes: its files are truncated to their sizes at the last save. Another
  command, or changed inputs, start anew.
- The lock belongs to the process (`lockf`), so workers that outlive a killed run for a moment do
  not hold it.
- The state says when the renames begin, so that the next run completes the renames of a killed run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_sffn.data.text.chunks import Position
from megatron_sffn.utils.atomic_files import atomic_write, sync
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class State:
    """Progress of a run.

    Args:
        position: position in the input.
        sizes: file name -> bytes that have been written.
        documents: number of documents that have been written.
        num_bytes: bytes of text that have been read.
        consumed: bytes on disk, of all inputs, that have been read.
        tokens: number of tokens that have been written, for each key.
        skipped: number of documents that were left out.
        complete: True when everything has been written and the renames begin.
    """

    position: Position = field(default_factory=Position)
    sizes: Mapping[str, int] = field(default_factory=dict)
    documents: int = 0
    num_bytes: int = 0
    consumed: int = 0
    tokens: tuple[int, ...] = ()
    skipped: int = 0
    complete: bool = False


class RunState:
    """The folder of a run, locked until `close`.

    Args:
        prefix: path and first part of the name of all files.
        files: final paths, in the order of the renames.
        command: flags and inputs, which determine the files.
        say: receives a line when the work of another run is discarded.

    Raises:
        ConfigError: the folder cannot be written, or another run writes in it.
    """

    def __init__(
        self,
        prefix: str,
        files: list[Path],
        command: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.folder = Path(f"{prefix}.partial")
        self.saved = False
        self._say = say
        self._command = json.loads(json.dumps({**command, "files": [path.name for path in files]}))
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error.strerror}); give another --output-prefix"
            ) from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            if os.fstat(self._lock.fileno()).st_nlink:
                return
        # The lock is taken, or a run that has just ended removed it with its folder.
        self._lock.close()
        raise ConfigError(
            f"{self.folder} is being written by another run; wait for its end, or give another "
            "--output-prefix"
        )

    def resume(self, *, repeatable: bool) -> State | None:
        """The state that a run of the same command saved; None: the run starts anew.

        Args:
            repeatable: True if the inputs can be read again.
        """
        command, record = self._read("command.json"), self._read("journal.json")
        if record is not None:
            position = Position(**record["position"])
            state = State(**{**record, "position": position, "tokens": tuple(record["tokens"])})
            if state.complete and command:
                self._rename(command["files"])
            if command == self._command and repeatable and self._holds(state):
                self.saved = True
                return state
            self._say(f"{self.folder} is of other flags or inputs, or not whole: starting anew")
        self._empty()
        self._write("command.json", self._command)
        return None

    def save(self, state: State) -> None:
        """Save the state; the files must be on the disk already."""
        self._write("journal.json", asdict(state))
        self.saved = True

    def finish(self, state: State) -> None:
        """Rename the files to their final names, and remove the folder."""
        names = self._command["files"]
        for name in names:
            if (path := self.folder / name).exists():
                sync(path)
        self.save(replace(state, complete=True))
        self._rename(names)
        self.discard()

    def close(self) -> None:
        """Release the lock; the folder stays if a state was saved from which a run can resume."""
        if not self._lock.closed:
            if self.saved:
                self._lock.close()
            else:
                self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _holds(self, state: State) -> bool:
        """True if the files have their sizes at the last save, or their final names."""
        paths = {self.folder / name: size for name, size in state.sizes.items()}
        return state.complete or all(
            path.exists() and path.stat().st_size >= size for path, size in paths.items()
        )

    def _rename(self, names: list[str]) -> None:
        names = [name for name in names if (self.folder / name).exists()]
        # Old files are removed in reverse order, so that a new file never stands beside an old one.
        for name in reversed(names):
            (self.folder.parent / name).unlink(missing_ok=True)
        for name in names:
            (self.folder / name).replace(self.folder.parent / name)
        sync(self.folder.parent)

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return None

    def _write(self, name: str, content: Any) -> None:
        with atomic_write(self.folder / name, durable=True) as file:
            file.write(json.dumps(content) + "\n")
