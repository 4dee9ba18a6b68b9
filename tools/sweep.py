"""Trains all runs of a study, several at a time, and writes their results as one table.

Inputs: the YAML file of a study. Outputs: a folder for each run, and `results.csv`,
`results.parquet`, `losses.csv` and `losses.parquet`; the implementation is in
`megatron_sffn/study/`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sffn.utils.errors import CommandParser, require, run_command
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.study.running.foresee import Forecast
    from megatron_sffn.study.running.study_file import Study

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
FOLLOW_SECONDS = 5

DESCRIPTION = """\
Train all runs of a study. Its YAML file lists models as flags of megatron_sffn.pretrain with one or
several values, seeds and learning rates; every combination is one run. The same command resumes
after Ctrl-C, a kill or a reboot, each run from its newest checkpoint.

actions:
  dry-run   print each run with its parameters, tokens, FLOPs and time, and why it cannot start
  run       train all unfinished runs (the default); failed ones are tried again
  status    print the state of each run; with --follow again every five seconds
  submit    train all unfinished runs as jobs of Slurm, with the file's `slurm` parameters
  stop      let the sweep of this study, and its Slurm jobs, save and end
  results   write the tables of the finished runs again, and print where they are
"""

EXAMPLE = """\
example: study.yaml
  folder: runs/block-size
  parallel: 2                  # runs at the same time, each of `ranks: 1`
  flags: |                     # of every run
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --train-iters 1000 ...
  points:
    - sffn-router: dense
    - {sffn-router: [avg-k, switch], sffn-block-size: [1, 16, 64], sffn-expansion: 16}
  each: {seed: [1, 2, 3], lr: [1e-3, 2e-3, 4e-3]}

docs/studies.md explains all keys. `megatron-sffn report FOLDER` draws the results.
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(
        prog="megatron-sffn sweep",
        usage="megatron-sffn sweep STUDY.yaml [dry-run|run|submit|status|stop|results] [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the file of the study")
    parser.add_argument(
        "action", nargs="?", default="run", choices=list(ACTIONS), help="see above (default: run)"
    )
    parser.add_argument("--size", help="one of the file's sizes (default: its first)")
    parser.add_argument("--follow", action="store_true", help="status: print it again and again")
    return parser


def dry_run(study: Study, args: argparse.Namespace) -> int:
    """Print what would run; exit code 2 if a run cannot start."""
    from megatron_sffn.study.running.foresee import foresee
    from megatron_sffn.study.running.terminal_tables import dry_run_table

    forecasts = foresee(study)
    print(dry_run_table(study, forecasts))
    return 2 if any(forecast.reason for forecast in forecasts) else 0


def run(study: Study, args: argparse.Namespace) -> int:
    """Train all unfinished runs; exit code 1 if one of them failed."""
    from megatron_sffn.study.running.sweep import Sweep, only_sweep

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    forecasts = _valid(study)
    try:
        with only_sweep(study):
            failed = Sweep(study, forecasts).run()
    except KeyboardInterrupt:
        print("interrupted: the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    for name in failed:
        print(f"error: {name} failed; see {study.folder}/runs/{name}/failure.txt", file=sys.stderr)
    return _print_results(study, forecasts) or int(bool(failed))


def status(study: Study, args: argparse.Namespace) -> int:
    """Print the state of each run."""
    from megatron_sffn.study.running.terminal_tables import status_table

    forecasts = _valid(study)
    while True:
        print(status_table(study, forecasts), flush=True)
        if not args.follow:
            return 0
        time.sleep(FOLLOW_SECONDS)
        print("\033[H\033[2J" if sys.stdout.isatty() else "", end="")


def submit(study: Study, args: argparse.Namespace) -> int:
    """Submit all unfinished runs to Slurm."""
    require("submitit", "submit", "slurm")
    from megatron_sffn.study.running.slurm import submit_runs

    arrays = submit_runs(study, _valid(study))
    for array, runs in arrays.items():
        print(f"job {array}: {runs} run{'s' if runs > 1 else ''}")
    print("status shows their progress" if arrays else "every run has finished or is running")
    return 0


def stop(study: Study, args: argparse.Namespace) -> int:
    """Ask the sweep and the Slurm jobs to stop; exit code 1 if there are none."""
    from megatron_sffn.study.running.slurm import stop_jobs
    from megatron_sffn.study.running.sweep import stop_sweep

    process = stop_sweep(study)
    if process is not None:
        print(f"process {process} was asked to stop; its runs end after a checkpoint")
    jobs = stop_jobs(study)
    if jobs:
        print(
            f"Slurm jobs {', '.join(jobs)}: those that run end after a checkpoint, others at once"
        )
    if process is None and not jobs:
        print(f"no sweep runs in {study.folder}", file=sys.stderr)
        return 1
    return 0


def results(study: Study, args: argparse.Namespace) -> int:
    """Write the tables again."""
    return _print_results(study, _valid(study))


def _valid(study: Study) -> list[Forecast]:
    from megatron_sffn.study.running.foresee import valid_forecasts

    return valid_forecasts(study)


def _print_results(study: Study, forecasts: Sequence[Forecast]) -> int:
    from megatron_sffn.study.running.ladder import needed_runs
    from megatron_sffn.study.running.sweep import write_results

    finished, needed = write_results(study, forecasts), needed_runs(study, forecasts)
    tables = f": {study.folder}/results.csv, results.parquet, losses.csv, losses.parquet"
    print(f"{finished} of {len(needed)} runs have finished{tables if finished else ''}")
    return 0


ACTIONS: dict[str, Callable[[Study, argparse.Namespace], int]] = {
    "dry-run": dry_run,
    "run": run,
    "submit": submit,
    "status": status,
    "stop": stop,
    "results": results,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)
    silence()

    from megatron_sffn.study.running.study_file import read_study

    study = read_study(args.study, args.size)
    if args.action != "stop":
        from megatron_sffn.patches import prepare

        prepare()  # before Megatron is imported
        logging.getLogger("megatron").setLevel(logging.WARNING)
    return ACTIONS[args.action](study, args)


if __name__ == "__main__":
    run_command(main)
