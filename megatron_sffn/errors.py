"""The one error a user can make, and how a command ends on it.

Enters: whatever a command was given. Leaves: one sentence on stderr and exit code 2.
Choice: a single exception type for every bad value, wherever it is found, so that an entry
point needs one `except`; our own invariants use `assert` instead (style: OLMo-core).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class ConfigError(ValueError):
    """A value the user gave that cannot work.

    The message is one sentence with the value, the rule it breaks, and the remedy:
    ``--sffn-block-size 48 does not divide --sffn-active-cells 1024; choose a divisor: 32 or 64``.
    """


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a process: a `ConfigError` becomes one sentence and exit code 2.

    Only the first rank of a torchrun job speaks; the others exit with the same code.
    """
    try:
        code = main() or 0
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
