"""Checks whether training can start on this machine, and says what to do if it cannot.

Inputs: this machine and this environment. Outputs: a table, or JSON, and an exit code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

from megatron_sffn.doctor import machine, packages
from megatron_sffn.doctor.findings import WRONG, Finding, absent, guarded
from megatron_sffn.doctor.smoke import smoke
from megatron_sffn.utils.errors import CommandParser, run_command

DESCRIPTION = """\
Check whether training can start on this machine, in this Python environment. The table has a line
for each check, with its state: ok, absent (an optional package or device is missing) or wrong. A
remedy follows a state that is not ok. The exit code is 0 if nothing is wrong, else 1.
"""

EXAMPLE = """\
example: before the first run, and after each change of drivers or packages
  python -m megatron_sffn.doctor

example: a container's health check, in seconds
  python -m megatron_sffn.doctor --no-smoke

example: all nodes of a Slurm job
  srun --ntasks-per-node 1 python -m megatron_sffn.doctor --json
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m megatron_sffn.doctor",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--no-smoke",
        dest="smoke",
        action="store_false",
        help="run nothing on GPUs, which may be in use, and leave out the smoke test: two ranks, a "
        "sum over them, two steps of a small model",
    )
    return parser


def examine(with_smoke: bool) -> list[Finding]:
    """Run all checks; the smoke test runs last, and only if nothing is wrong."""
    checks = {**packages.CHECKS, **machine.CHECKS}
    if not with_smoke:
        # A training may be using all memory of the GPU.
        checks["Triton"] = partial(packages.triton, on_gpu=False)
    with ThreadPoolExecutor(2) as pool:
        findings = list(pool.map(guarded, checks, checks.values()))
    if with_smoke and any(finding.state == WRONG for finding in findings):
        remedy = "mend what is wrong above, then run doctor again"
        findings.append(absent("smoke test", "not run", remedy))
    elif with_smoke:
        print("starting two ranks ...", file=sys.stderr, flush=True)
        findings.append(guarded("smoke test", smoke))
    return findings


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, with each remedy below its finding."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'check':{width}}  state   found"]
    for finding in findings:
        lines.append(f"{finding.name:{width}}  {finding.state:6}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':{width}}          -> {finding.remedy}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    print("checking packages and machine ...", file=sys.stderr, flush=True)
    findings = examine(args.smoke)
    bad = [finding.name for finding in findings if finding.state == WRONG]
    if args.json:
        print(json.dumps({"ready": not bad, "checks": [asdict(f) for f in findings]}, indent=1))
    else:
        print(table(findings))
        verdict = f"wrong here: {', '.join(bad)}" if bad else "training can start here"
        print(f"\n{verdict}")
    return 1 if bad else 0


if __name__ == "__main__":
    run_command(main)
