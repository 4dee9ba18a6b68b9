"""One line of the table, and the other processes that it is made of.

Enters: a check. Leaves: a `Finding`, whatever happens in the check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROBE_SECONDS = 300
"""A probe that takes longer hangs; the longest compiles for half a minute."""

SHOWN = 300
"""Characters of a message."""


OK, ABSENT, WRONG = "ok", "absent", "wrong"
"""States of what was looked at; without what is absent training can start."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Args:
        name: of the check.
        state: `OK`, `ABSENT` or `WRONG`.
        found: in a few words.
        remedy: what to do; empty where nothing is to be done.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


Check = Callable[[str], Finding]
"""The name of a line -> the line."""


class ProbeError(Exception):
    """A probe failed; the message is the last line that it said."""


def ok(name: str, found: str) -> Finding:
    """A line without a remedy."""
    return Finding(name=name, state=OK, found=found)


def absent(name: str, found: str, remedy: str) -> Finding:
    """A line on something optional."""
    return Finding(name=name, state=ABSENT, found=found, remedy=remedy)


def wrong(name: str, found: str, remedy: str) -> Finding:
    """A line that ends with exit code 1."""
    return Finding(name=name, state=WRONG, found=found, remedy=remedy)


def guarded(name: str, check: Check) -> Finding:
    """A check that cannot end the others."""
    try:
        return check(name)
    except ProbeError as error:
        return absent(name, f"not known ({error})", "mend torch first")
    except Exception as error:
        found = f"cannot be looked at ({type(error).__name__}: {error})"
        return wrong(name, found, "mend what the message names, or report it as a bug of doctor")


def probe(name: str, **environment: str) -> dict[str, Any]:
    """Run a function of `probes.py` in a process of its own.

    Args:
        name: of the function.
        environment: variables for it.

    Returns:
        What the function returned.

    Raises:
        ProbeError: if it failed or hung.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_sffn.doctor.probes", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {PROBE_SECONDS} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ProbeError(said[-1].strip()[:SHOWN] if said else f"exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
