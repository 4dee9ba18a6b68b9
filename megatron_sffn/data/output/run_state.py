"""A folder in which files grow for hours, and from which a killed run is taken up again.

Enters: the files that a run is to write, and the command that determines them. Leaves: the files
under their names, all complete; or, after a kill, the folder `PREFIX.partial`, in which
`journal.json` says how far input and files were when all of them were last on the disk.

Choices
- The same command goes on: its files are cut to what the state says. Another command, or other
  inputs, start anew.
- The lock is one of the process alone (`lockf`): workers that outlive a killed run for a moment do
  not hold it.
- The state says when the renames begin: after a kill among them the next run ends them.
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
    """How far a run is.

    Args:
        position: where reading goes on.
        sizes: bytes of each file, by name.
        documents: that are written.
        num_bytes: of text that are read.
        consumed: bytes on disk, of all inputs, that are read.
        tokens: that are written, for each key.
        skipped: documents that are left out.
        complete: all is written, and files get their names.
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
    """The folder of a run, locked until it is left.

    Args:
        prefix: of the files.
        finals: the files, in the order in which they get their names.
        command: what determines them: flags and inputs.
        say: told when another run's work is thrown away, or taken up.

    Raises:
        ConfigError: the folder cannot be written, or another run is at work in it.
    """

    def __init__(
        self,
        prefix: str,
        finals: list[Path],
        command: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.folder = Path(f"{prefix}.partial")
        self.saved = False
        self._say = say
        self._command = json.loads(json.dumps({**command, "files": [path.name for path in finals]}))
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
        # Taken, or removed with its folder by a run that has just ended.
        self._lock.close()
        raise ConfigError(
            f"{self.folder} is being written by another run; wait for its end, or give another "
            "--output-prefix"
        )

    def resume(self, *, repeatable: bool) -> State | None:
        """What a run of the same command left; None: the folder is empty.

        Args:
            repeatable: whether the inputs can be read again.
        """
        former, state = self._read("command.json"), self._read("journal.json")
        if state is not None:
            state["position"] = Position(**state["position"])
            found = State(**{**state, "tokens": tuple(state["tokens"])})
            if found.complete and former:
                self._rename(former["files"])
            if former == self._command and repeatable and self._holds(found):
                self.saved = True
                return found
            self._say(f"{self.folder} is of other flags or inputs, or not whole: starting anew")
        self._empty()
        self._write("command.json", self._command)
        return None

    def save(self, state: State) -> None:
        """Note how far the run is; its files are on the disk already."""
        self._write("journal.json", asdict(state))
        self.saved = True

    def finish(self, state: State) -> None:
        """Give the files their names, and remove the folder."""
        names = self._command["files"]
        for name in names:
            if (path := self.folder / name).exists():
                sync(path)
        self.save(replace(state, complete=True))
        self._rename(names)
        self.discard()

    def close(self) -> None:
        """End the lock; the folder stays for the next run, if there is something to take up."""
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
        """Whether the files are as long as they were, or have their names already."""
        paths = {self.folder / name: size for name, size in state.sizes.items()}
        return state.complete or all(
            path.exists() and path.stat().st_size >= size for path, size in paths.items()
        )

    def _rename(self, names: list[str]) -> None:
        names = [name for name in names if (self.folder / name).exists()]
        # From the last to the first: no new file ever stands beside an old one.
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
