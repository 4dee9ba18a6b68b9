"""Shows finished runs side by side, with what differs between them.

The implementation is in `megatron_sffn/study/`.

Inputs: folders of runs. Outputs: a table of their results, and warnings where their data, steps,
seeds or evaluation differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, run_command

DESCRIPTION = """\
Show the results of finished runs as a table, best loss first: losses, parameters, FLOPs, tokens
and speed. Warnings name every setting by which their losses or speeds are not comparable, such as
other data, another number of tokens, or another evaluation.
"""

EXAMPLE = """\
example:
  megatron-sffn compare runs/dense runs/avg-k
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(prog="megatron-sffn compare", description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: its --save")
    add("--json", action="store_true", help="print the summaries and the warnings as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)

    from megatron_sffn.study.compare import differences, results_table, single_seeds
    from megatron_sffn.study.runs import SUMMARY, read_runs

    runs, unfinished = read_runs(args.runs)
    warnings = [str(difference) for difference in differences(runs)]
    warnings += [f"{folder} has no {SUMMARY} and is left out: unfinished" for folder in unfinished]
    if len(runs) > 1 and single_seeds(runs):
        warnings.append("no setting was trained with two seeds, so that a difference may be chance")
    if args.json:
        summaries = {run.name: run.summary for run in runs}
        print(json.dumps({"runs": summaries, "warnings": warnings}, indent=2))
        return 0
    print(results_table(runs))
    for warning in warnings:
        print(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    run_command(main)
