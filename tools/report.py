"""Reports on a study: orderings that hold, figures, tables.

The implementation is in `megatron_sffn/study/`.

Inputs: the folder of a study, or folders of runs. Outputs: `index.html`, figures, tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, require, run_command

DESCRIPTION = """\
Report on a study: which orderings of routers and block sizes hold beyond the spread of seeds, which
do not, and what was not run; losses, cost, effective speedup, balance, learning rates and scaling
as figures (PNG, SVG) and tables (Markdown, LaTeX), and one page that needs no network.
"""

EXAMPLE = """\
example:
  megatron-sffn report studies/block-size --output studies/block-size/report

example: runs that no sweep has started
  megatron-sffn report runs/dense runs/avg-k --output reports/mine
"""

SHOWN = 6
"""Sentences of each part of the text that the terminal shows."""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(prog="megatron-sffn report", description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    folder = "folder of a study, as megatron-sffn sweep leaves it, or of a finished run"
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=folder)
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--json", action="store_true", help="print the findings as JSON; report.json has them, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)
    for package in ("pandas", "scipy", "matplotlib", "jinja2"):
        require(package, "report", "study")

    from megatron_sffn.study.reporting import page
    from megatron_sffn.study.reporting.conclusions import conclude
    from megatron_sffn.study.reporting.findings import find
    from megatron_sffn.study.reporting.results import read_results

    findings = find(read_results(args.folders))
    path = page.write(findings, f"Report of {args.folders[0].resolve().name}", args.output)
    conclusions = conclude(findings)
    if args.json:
        print(json.dumps(page.as_json(findings, conclusions), indent=2))
        return 0
    print("\n".join(conclusions.lines(SHOWN)))
    print(f"\npage: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
