"""Draws how a run routes: load, dead blocks, gates, and which tokens choose which blocks.

The implementation is in `megatron_sffn/analysis/`.

Inputs: the folder of a run. Outputs: `index.html` with plots, `tokens.csv`, `summary.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, ConfigError, require, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Analyze the routing of a run: load per block and layer over time, which blocks are chosen together
and for which tokens, and what changes between checkpoints. Reads RUN/routing.jsonl, and replays
the first validation tokens through every checkpoint in RUN, in one process, with the command line
of the run.
"""

EXAMPLE = """\
example:
  .venv/bin/python tools/analyze_routing.py runs/quickstart/avg-k --tokens 32768 --layers 3 6

example: the data moved; flags after -- are added to the command of the run
  .venv/bin/python tools/analyze_routing.py runs/mine -- --data-path /new/place/text_document
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(
        description=DESCRIPTION,
        epilog=EXAMPLE,
        usage="analyze_routing.py RUN [options] [-- TRAINING FLAGS]",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run (its --save)")
    add("--out", type=Path, metavar="DIR", help="folder of the results (default: RUN/routing)")
    tokens = "number of validation tokens to replay, from the first (default: %(default)s)"
    add("--tokens", type=int, metavar="N", default=16384, help=tokens)
    add(
        "--iterations",
        type=int,
        metavar="I",
        nargs="+",
        help="iterations of the checkpoints to replay (default: all complete ones)",
    )
    add(
        "--layers",
        type=int,
        metavar="L",
        nargs="+",
        help="layers to analyze, counted from 1 (default: all sparse layers)",
    )
    top = "number of the most used blocks to show in matrices and tokens.csv (default: %(default)s)"
    add("--top", type=int, metavar="B", default=64, help=top)
    return parser


def analyze(args: argparse.Namespace, training_flags: Sequence[str]) -> Path:
    """Run the tool.

    Args:
        args: the flags of the tool.
        training_flags: added to the command of the run.

    Returns:
        Path of the page.

    Raises:
        ConfigError: there is nothing to analyze, or a checkpoint cannot be replayed.
    """
    from megatron_sffn.analysis import lines, replay, report
    from megatron_sffn.analysis.tokens import decoder

    say = partial(print, flush=True)
    for flag, value in (("--tokens", args.tokens), ("--top", args.top)):
        if value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1; give a positive number")
    routing_lines = lines.read_lines(args.run)
    layers = lines.layers_in(routing_lines)
    for layer in args.layers or []:
        if layer not in layers:
            raise ConfigError(
                f"--layers {layer} is no sparse layer of {args.run}; use some of "
                f"{', '.join(map(str, layers))}"
            )
    layers = sorted(set(args.layers or layers))
    checkpoints = replay.checkpoints(args.run, args.iterations, say)
    out = args.out or args.run / "routing"
    player = replay.Replay(
        run=args.run,
        folder=out / "recordings",
        tokens=args.tokens,
        extra=training_flags,
        say=say,
    )
    recordings = {
        iteration: player.recording(iteration, checkpoint)
        for iteration, checkpoint in checkpoints.items()
    }
    replay.check_same_tokens(recordings)
    analysis = report.Analysis(
        run=args.run,
        lines=[line for line in routing_lines if line["layer"] in layers],
        recordings=recordings,
        layers=layers,
        top=args.top,
        decode=decoder(checkpoints[max(checkpoints)], say),
    )
    return report.write(analysis, out, say)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    words = list(sys.argv[1:] if argv is None else argv)
    separator = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:separator])
    require("matplotlib", "analyze_routing", "plot")

    from megatron_sffn.patches import prepare

    prepare()
    print(f"page: {analyze(args, words[separator + 1 :])}")
    return 0


if __name__ == "__main__":
    run_command(main)
