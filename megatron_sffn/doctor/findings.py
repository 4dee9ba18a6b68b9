"""A finding, which is a line of the table, and probes that run in another process.

Inputs: a check. Outputs: a `Finding`, whatever happens in the check.
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
"""Seconds after which a probe counts as hanging; the slowest one compiles for half a minute."""

SHOWN = 300
"""Most characters of a message in the table."""

OK, ABSENT, WRONG = "ok", "absent", "wrong"
"""States of a finding; training can start if an optional package is `ABSENT`."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check.

    Args:
        name: name of the check.
        state: `OK`, `ABSENT` or `WRONG`.
        found: the result in a few words.
        remedy: what the user can do; empty if there is nothing to do.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


Check = Callable[[str], Finding]
"""A check is called with its name and returns its finding."""


class ProbeError(Exception):
    """A probe failed; the message is the last line of its output."""


def ok(name: str, found: str) -> Finding:
    """A finding without a remedy."""
    return Finding(name=name, state=OK, found=found)


def absent(name: str, found: str, remedy: str) -> Finding:
    """A finding about something optional that is not installed."""
    return Finding(name=name, state=ABSENT, found=found, remedy=remedy)


def wrong(name: str, found: str, remedy: str) -> Finding:
    """A finding that makes the exit code 1."""
    return Finding(name=name, state=WRONG, found=found, remedy=remedy)


def guarded(name: str, check: Check) -> Finding:
    """Run a check; its errors become findings, so that the other checks still run."""
    try:
        return check(name)
    except ProbeError as error:
        return absent(name, f"not known ({error})", "mend torch first")
    except Exception as error:
        found = f"cannot be looked at ({type(error).__name__}: {error})"
        return wrong(name, found, "mend what the message names, or report it as a bug of doctor")


def probe(name: str, **environment: str) -> dict[str, Any]:
    """Run a function of `probes.py` in another process.

    Args:
        name: name of the function.
        environment: environment variables for the process.

    Returns:
        The function's result.

    Raises:
        ProbeError: if it failed or hung.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-m", "megatron_sffn.doctor.probes", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {PROBE_SECONDS} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ProbeError(lines[-1].strip()[:SHOWN] if lines else f"exit code {result.returncode}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer
