"""The one error a user can make, and how a command ends on it.

Enters: whatever a command was given. Leaves: one sentence on stderr and exit code 2.
Choice: a single exception type for every bad value, wherever it is found, so that an entry
point needs one `except`; our own invariants use `assert` instead (style: OLMo-core).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

BROKEN_PIPE = 141
"""Exit code of a command whose output nobody reads, as a shell has it."""
OTHER_RANKS_WAIT = 30.0
"""Seconds: ranks reach the same error within a few of each other."""


class ConfigError(ValueError):
    """A value the user gave that cannot work.

    The message is one sentence with the value, the rule it breaks, and the remedy:
    ``--sffn-block-size 48 does not divide --sffn-active-cells 1024; choose a divisor: 32 or 64``.
    """


def reject(message: str) -> NoReturn:
    """What `argparse.ArgumentParser.error` shall be: its complaint as ours."""
    raise ConfigError(f"{message}; --help lists every flag")


class CommandParser(argparse.ArgumentParser):
    """A command's flags: whole names only, help as it is written, complaints as `ConfigError`.

    Args:
        options: of argparse's parser.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **options})

    def error(self, message: str) -> NoReturn:
        """What argparse calls."""
        reject(message)


def reason_in(output: str) -> str:
    """The line that says why a command failed, of all that it and its launcher printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (said or lines[-1:] or ["no output"])[0].removeprefix("error: ")


def require(module: str, asked_by: str, extra: str) -> None:
    """Refuse what needs an optional package where that is not installed.

    Args:
        module: that would be imported.
        asked_by: the flag or command.
        extra: of this package, which brings it.

    Raises:
        ConfigError: with the extra.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that it is a part of
        found = None
    if found is None:
        raise ConfigError(
            f"{asked_by} needs {module}, which is not installed; pip install "
            f"'megatron-sffn[{extra}]'"
        )


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a process: a `ConfigError` becomes one sentence and exit code 2.

    The first rank of a torchrun job speaks; its exit makes the launcher stop the others.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has ended, as `| head` does; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except ConfigError as error:
        if os.environ.get("RANK", "0") != "0":
            # Leaving first would stop the first rank before it speaks; a rank that is still there
            # after the wait is the only one that saw the error.
            time.sleep(OTHER_RANKS_WAIT)
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
