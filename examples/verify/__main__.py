"""Verifies the configurations of `examples/configs/`: `python -m examples.verify`.

Outputs: a card for each configuration in `examples/configs/cards/`, and `docs/verified.md`, which
is made of the cards.

Design notes: a check that has passed for the flags of today is skipped, and each card is written as
soon as its check is done. So the same command resumes after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.verify import cards, page
from examples.verify.cards import FAILED, PASSED
from examples.verify.configurations import CONFIGURATIONS, Configuration
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Verify the configurations of examples/configs by running them: build each at full size without
storage and count it, train it for 5 steps at toy size on 2 ranks, measure the bytes that its ranks
hold against the closed forms, and compare the losses of other layouts with those of one rank.
What passed is written to a card of each configuration (examples/configs/cards) and to
docs/verified.md. Checks that have passed are skipped; the same command resumes after Ctrl-C.
"""

EXAMPLE = """\
example:
  .venv/bin/python -m examples.verify --only 'avg-k 64' --checks built,trained
"""

RUNNABLE = ("built", "trained", "layouts")
"""Checks of this command; a training also measures the memory."""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m examples.verify", description=DESCRIPTION, epilog=EXAMPLE
    )
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="configurations whose name matches")
    add(
        "--checks",
        default=",".join(RUNNABLE),
        metavar="A,B,...",
        help=f"checks to run (default: {','.join(RUNNABLE)})",
    )
    add("--again", action="store_true", help="also run checks that have passed")
    add("--list", action="store_true", help="print the names of the configurations, run nothing")
    return parser


def build(configuration: Configuration, card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build the model on fake ranks, and count it."""
    from examples.verify.built import count_and_check
    from examples.verify.configurations import arguments_of

    counts = [
        count_and_check(arguments_of(configuration.script, *configuration.arguments, ranks=ranks))
        for ranks in configuration.ranks
    ]
    assert counts[1:] == counts[:-1], f"layouts differ: {counts}"
    card["counts"] = counts[0]
    return {"built": {"ranks": list(configuration.ranks)}}


def train(configuration: Configuration, card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train at toy size, and measure the memory."""
    from examples.verify import trained

    flags = configuration.flags(TOY="1")
    training = trained.train(flags, folder)
    trained.assert_trained(training)
    counted = trained.counted_bytes(flags, trained.TOY_RANKS)
    trained.assert_memory(training, counted)
    return {
        "trained": {"ranks": trained.TOY_RANKS, "losses": training.losses},
        "memory": {"ranks": trained.TOY_RANKS, "bytes": vars(counted)},
    }


def compare(configuration: Configuration, card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in several layouts, and compare their losses with those of one rank."""
    from examples.verify import trained

    return {"layouts": {"largest_differences": trained.compare_layouts(configuration, folder)}}


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "built": build,
    "trained": train,
    "layouts": compare,
}
COMMANDS = {
    "built": "python -m examples.verify --again --checks built --only '^{name}$'",
    "trained": "TOY=1 {line}",
    "memory": "python -m examples.verify --again --checks trained --only '^{name}$'",
    "layouts": "python -m examples.verify --again --checks layouts --only '^{name}$'",
}
"""Check -> the command that repeats it."""


def verify(configuration: Configuration, checks: Sequence[str], *, again: bool) -> list[str]:
    """Run the checks of a configuration that have not passed; returns a word for each."""
    card, digest = cards.read_card(configuration), configuration.digest()
    if card["flags_sha256"] != digest:
        card = {
            **card,
            "flags_sha256": digest,
            "checks": {name: {"result": cards.NOT_RUN} for name in cards.CHECKS},
        }
    words = []
    for name in checks:
        if card["checks"][name]["result"] == PASSED and not again:
            words.append(f"{name} had passed")
            continue
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                results = RUNS[name](configuration, card, Path(folder))
            outcome: dict[str, Any] = {"result": PASSED}
        except (AssertionError, ConfigError) as error:
            results = {name: {}}
            outcome = {"result": FAILED, "reason": str(error).strip().splitlines()[-1]}
        seconds = time.monotonic() - start
        for result, values in results.items():
            line = COMMANDS[result].format(name=configuration.name, line=configuration.line)
            run = cards.run_record(line, seconds)
            card["checks"][result] = {**outcome, **values, "run": run}
        cards.write_card(configuration, card)
        reason = f": {outcome['reason']}" if "reason" in outcome else ""
        words.append(f"{name} {outcome['result']} in {seconds:.1f} s{reason}")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments of the command line."""
    silence()
    args = build_parser().parse_args(argv)
    checks = [name.strip() for name in args.checks.split(",")]
    for name in checks:
        if name not in RUNNABLE:
            raise ConfigError(f"--checks {name} is unknown; choose from {', '.join(RUNNABLE)}")
    chosen = [c for c in CONFIGURATIONS if re.search(args.only, c.name)]
    if not chosen:
        raise ConfigError(f"--only {args.only} matches no configuration; --list prints their names")
    if args.list:
        print("\n".join(configuration.name for configuration in chosen))
        return 0
    from megatron_sffn.patches import prepare

    prepare()  # before Megatron is imported
    logging.getLogger("megatron").setLevel(logging.ERROR)
    failed = 0
    for number, configuration in enumerate(chosen, 1):
        words = verify(configuration, checks, again=args.again)
        failed += any(f" {FAILED} " in word for word in words)
        print(
            f"[{number}/{len(chosen)}] {configuration.name}: {', '.join(words)}",
            file=sys.stderr,
            flush=True,
        )
    page.write()
    print(f"page: {page.PAGE}; {failed} of {len(chosen)} configurations failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
