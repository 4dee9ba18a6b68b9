"""One name of torch or Megatron that is replaced, and why.

Enters: a row of a platform's table. Leaves: the name replaced, or a sentence that names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """One replaced name.

    Args:
        target: dotted name of the attribute that is replaced.
        make: builds the replacement from the original.
        needed_by: dotted name of the Megatron function or class whose code uses it.
    """

    target: str
    make: Callable[[Any], Any]
    needed_by: str


def resolve(dotted: str) -> tuple[Any, str]:
    """Find the object that holds a dotted name.

    Returns:
        The holder (a module or class) and the last part of the name.

    Raises:
        LookupError: if a part of the name does not exist.
    """
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # another one, which this one imports
            continue
        try:
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            getattr(owner, parts[-1])
        except AttributeError:
            break
        return owner, parts[-1]
    raise LookupError(dotted)


def apply(adaptation: Adaptation) -> None:
    """Replace the name.

    Raises:
        ConfigError: if it no longer exists, or what holds it cannot be imported.
    """
    try:
        owner, name = resolve(adaptation.target)
    except LookupError:
        raise ConfigError(
            f"{adaptation.target}, which megatron-sffn replaces for {adaptation.needed_by}, does "
            "not exist in the installed torch or megatron-core; install the versions of "
            "constraints.txt"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"{adaptation.target.partition('.')[0]} cannot be imported ({reason}); python -m "
            "megatron_sffn.doctor says which package to mend"
        ) from error
    setattr(owner, name, adaptation.make(getattr(owner, name)))


_APPLIED: set[str] = set()
"""Targets that `apply_once` has replaced in this process."""


def apply_once(adaptations: Iterable[Adaptation]) -> None:
    """Replace the names; those that a former call has replaced stay as they are.

    Raises:
        ConfigError: if one no longer exists.
    """
    for adaptation in adaptations:
        if adaptation.target not in _APPLIED:
            apply(adaptation)
            _APPLIED.add(adaptation.target)
