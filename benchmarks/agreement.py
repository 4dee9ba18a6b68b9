"""Results that disagree: nothing is compared, one sentence, exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Callable


class DisagreementError(RuntimeError):
    """Contenders computed different things: their times compare nothing."""


def refusing(main: Callable[[], int]) -> int:
    """`main`, where results that disagree are one sentence and exit code 1."""
    try:
        return main()
    except DisagreementError as error:
        print("error:", error, file=sys.stderr, flush=True)
        return 1
