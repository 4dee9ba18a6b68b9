"""Passes the launches of Triton kernels to a function instead of the device.

Design notes: the function gets the arguments that the package's own launcher would pass to Triton,
because a constant of another type would have another key in Triton's cache.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from megatron_sffn.ops import triton_launch


@dataclass(frozen=True, kw_only=True)
class Start:
    """A launch of a kernel: its programs, warps and stages, and its arguments by name."""

    kernel: Any
    programs: int
    warps: int
    stages: int
    arguments: dict[str, Any]


@contextmanager
def handed_to(take: Callable[[Start], None]) -> Iterator[None]:
    """In this context `take` gets the launches and no kernel runs: results are not initialised."""
    with mock.patch.object(triton_launch, "_kernel", lambda name: _Kernel(name, take)):
        yield


class _Kernel:
    """The stand-in for a kernel that the launcher calls."""

    def __init__(self, name: str, take: Callable[[Start], None]) -> None:
        self.kernel, self.take = pkgutil.resolve_name(name), take
        self.arg_names: list[str] = self.kernel.arg_names

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def start(*, num_warps: int, num_stages: int, **arguments: Any) -> None:
            self.take(
                Start(
                    kernel=self.kernel,
                    programs=grid[0],
                    warps=num_warps,
                    stages=num_stages,
                    arguments=arguments,
                )
            )

        return start
