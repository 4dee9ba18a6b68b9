"""Help in two steps for a command with hundreds of flags, and a suggestion for a mistyped flag.

`--help` prints the group of our flags, and `--help-all` prints Megatron's flags as well. An unknown
flag is refused with the flag that is spelled most like it.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import re
from functools import partial
from typing import Any, NoReturn

from megatron_sffn.utils.errors import ConfigError


def help_in_two_steps(parser: argparse.ArgumentParser, our_group: Any) -> None:
    """Add `--help`, which prints one group, and `--help-all`, which prints all groups.

    Args:
        parser: parser with all flags.
        our_group: the group of flags that `--help` prints.
    """
    parser.add_argument("--help-all", action="help", help="print all flags, Megatron's too")
    short = copy.copy(parser)
    short._action_groups = [our_group]
    short.epilog = (
        "Megatron's several hundred flags, which work as they do there (model sizes, data, "
        "optimizer, layout, checkpoints, logging): --help-all."
    )
    for option in ("-h", "--help"):
        parser._option_string_actions[option] = _Help(short)
    parser.error = partial(reject_flag, parser)  # type: ignore[method-assign]


class _Help(argparse.Action):
    """Prints the help of a parser and ends the command."""

    def __init__(self, printed: argparse.ArgumentParser) -> None:
        super().__init__(["-h", "--help"], argparse.SUPPRESS, nargs=0)
        self.printed = printed

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print it."""
        self.printed.print_help()
        parser.exit()


def reject_flag(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replace `parser.error`: raise argparse's message, with the flag that was probably meant.

    Raises:
        ConfigError: always.
    """
    suggestion = ""
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    if unknown:
        known = parser._option_string_actions
        similar = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.8)
        suggestion = f"did you mean {similar[0]}? " if similar else ""
    raise ConfigError(f"{message}; {suggestion}--help lists our flags, --help-all all")
