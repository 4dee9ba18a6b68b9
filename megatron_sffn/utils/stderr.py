"""Lines for the user on stderr, which leave stdout to results."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print a line on stderr at once."""
    print(message, file=sys.stderr, flush=True)
