"""The parts of a section: named cases, and the context that they run in.

Inputs: the environment that the supervisor gives to a section's process.
Outputs: values of a case; or `Failure` with a sentence, or `NotHere` with the reason why a case
cannot run on this machine.

Design notes: torch is imported when a device is asked for, so that a process whose section fails to
import it can still say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Values = Mapping[str, Any]
"""The results of a case, as values that JSON can hold."""


class Failure(AssertionError):
    """A result is wrong; the message is one sentence with the value and the rule."""


class NotHere(RuntimeError):
    """A case cannot run on this machine; the message says what is missing. It counts as skipped."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One check or measurement.

    Args:
        name: unique within its section.
        run: the function; returns its results, or raises `Failure` or `NotHere`.
    """

    name: str
    run: Callable[[], Values | None]


@dataclass(frozen=True, kw_only=True)
class Context:
    """The device, the folders and the deadline of the cases of a section.

    Args:
        dry: True for a dry run: tiny sizes, on the CPU.
        out: the folder of the results.
        scratch: a folder for temporary files.
        deadline: time of `time.monotonic` after which no case starts.
    """

    dry: bool
    out: Path
    scratch: Path
    deadline: float

    @property
    def device(self) -> torch.device:
        """The GPU; the CPU in a dry run."""
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def choose[Size](self, gpu: Size, dry: Size) -> Size:
        """`gpu` on a GPU, `dry` in a dry run."""
        return dry if self.dry else gpu

    def synchronize(self) -> None:
        """Wait for the device, so that a kernel raises its error in the case that launched it."""
        if not self.dry:
            import torch

            torch.cuda.synchronize()
