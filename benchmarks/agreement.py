"""Stop a benchmark whose contenders disagree: one sentence, exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Callable


class DisagreementError(RuntimeError):
    """Contenders computed different results, so their times cannot be compared."""


def refusing(main: Callable[[], int]) -> int:
    """Run `main`; turn a `DisagreementError` into one sentence and exit code 1."""
    try:
        return main()
    except DisagreementError as error:
        print("error:", error, file=sys.stderr, flush=True)
        return 1
