"""One name of torch or Megatron that is replaced, and why.

Inputs: the tables `PATCHES` of this package's modules. Outputs: the names replaced, each once, or a
`ConfigError` that says which name the installed versions lack.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sffn.utils.errors import ConfigError

Make = Callable[[Any], Any]
"""Builds a replacement from the original."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced name.

    Args:
        target: dotted name of the attribute that is replaced.
        needed_by: dotted name of the Megatron or torch function or class whose code uses it.
        why: the failure without it, as a clause.
        until: the change in Megatron or torch that makes it unnecessary, as a clause.
        make: builds the replacement; None if the run that applies the patch passes its own.
        fixed: True if the installed release has the change `until`, as the object that holds the
            name shows; the patch then drops out, and the name need not exist. None if it cannot
            be seen there.
    """

    target: str
    needed_by: str
    why: str
    until: str
    make: Make | None = None
    fixed: Callable[[Any], bool] | None = None


def resolve(dotted: str) -> tuple[Any, str]:
    """Find the object that holds a dotted name.

    Returns:
        The holder (a module or class) and the last component of the name.

    Raises:
        LookupError: if a component of the name does not exist.
    """
    owner, name = _holder(dotted)
    if not hasattr(owner, name):
        raise LookupError(dotted)
    return owner, name


def _holder(dotted: str) -> tuple[Any, str]:
    """As `resolve`, but the last component need not exist."""
    components = dotted.split(".")
    for cut in range(len(components) - 1, 0, -1):
        module = ".".join(components[:cut])
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, but one that it imports does not
            continue
        try:
            for component in components[cut:-1]:
                owner = getattr(owner, component)
        except AttributeError:
            break
        return owner, components[-1]
    raise LookupError(dotted)


_APPLIED: dict[str, tuple[Any, Make]] = {}
"""Target -> the original, and the maker of the replacement in this process."""

DROPPED: dict[str, str] = {}
"""Target -> the change `until` of a patch that has dropped out in this process."""


def dropped_line() -> str:
    """The patches that have dropped out in this process, and why; empty if none has."""
    reasons = [f"{target} ({until})" for target, until in DROPPED.items()]
    return f"no longer replaced: {'; '.join(reasons)}" if reasons else ""


def apply(patch: Patch, make: Make | None = None) -> None:
    """Replace the name; idempotent.

    A patch that is applied again changes nothing. With another `make` the replacement is built from
    the original again: replacements never wrap each other. One that is `fixed` changes nothing.

    Args:
        patch: the row of the table.
        make: builds the replacement, for a patch that has no `make` of its own.

    Raises:
        ConfigError: if the name does not exist, or its module cannot be imported.
    """
    make = make or patch.make
    assert make is not None, patch
    try:
        if patch.fixed is not None and patch.target not in _APPLIED:
            owner, _ = _holder(patch.target)
            if patch.fixed(owner):
                DROPPED[patch.target] = patch.until
                return
        owner, name = resolve(patch.target)
    except LookupError:
        raise ConfigError(
            f"{patch.target}, which megatron-sffn replaces for {patch.needed_by}, does not exist "
            "in the installed torch or megatron-core; install the versions of constraints.txt"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"{patch.target.partition('.')[0]} cannot be imported ({reason}); python -m "
            "megatron_sffn.doctor says which package to mend"
        ) from error
    original, applied_make = _APPLIED.get(patch.target, (getattr(owner, name), None))
    if make != applied_make:
        setattr(owner, name, make(original))
        _APPLIED[patch.target] = (original, make)
