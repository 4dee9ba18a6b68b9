"""When, on which commit and with which packages something was measured.

Enters: nothing. Leaves: words for the columns of results.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version_of(package: str) -> str:
    """Of an installed package; empty if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit(output: Path | None) -> str:
    """Short hash, with `-dirty` where tracked files other than the results differ from it."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("diff", "--name-only", "HEAD").splitlines()
        name = git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""
    others = [path for path in changed if output is None or ROOT / path != output.resolve()]
    return f"{name}-dirty" if others else name
