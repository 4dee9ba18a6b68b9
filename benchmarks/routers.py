"""Compare routers and block sizes by pretraining runs of equal active cells, with several seeds.

Inputs: the data sets of a quick start (`--quickstart FOLDER`, made by `make quickstart`). Outputs:
`results.jsonl` with a line per run, and a table of held-out perplexity (mean and standard deviation
over seeds), FLOPs, throughput, and blocks that no held-out token used.

Design notes:
- Every run has the quick start's model and schedule on one rank; only the feed-forward layer
  differs, and nothing is tuned for a router.
- Routers of single cells run only at g = 1, product keys of blocks at g = 1 and 64.
- A finished run is a line of the results and is not repeated, so that the command can be resumed.
  Only the log of a run is kept. With `--jobs` runs share the machine, so their throughput
  is only comparable with that of other runs of the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.quickstart.runs import COMMON
from megatron_sffn.utils.atomic_files import append_records, read_records
from megatron_sffn.utils.errors import ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.nn.router_config import RouterTestNumbers

EXPANSION, BLOCK_SIZES = 16, (64, 256)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Args:
        router: name.
        block_size: g.
        seed: seed of the weights and of the order of the data.
    """

    router: str
    block_size: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.router}-g{self.block_size}-seed{self.seed}"

    @property
    def flags(self) -> str:
        """The flags of the feed-forward layer."""
        if self.router == "dense":
            return "--sffn-router dense"
        return (
            f"--sffn-router {self.router} --sffn-block-size {self.block_size} "
            f"--sffn-expansion {EXPANSION} {_test_numbers(self.router).paper_flags}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs without a result, then print the table."""
    args = _parse(argv)
    jobs = [
        Job(router=router, block_size=g, seed=seed)
        for seed in args.seeds
        for router in args.routers
        for g in _block_sizes(router)
    ]
    records = args.output / "results.jsonl"
    finished_keys = {_key(record) for record in read_records(records)}
    keys = {job: _key({**dataclasses.asdict(job), "iterations": args.train_iters}) for job in jobs}
    missing_jobs = [job for job in jobs if keys[job] not in finished_keys]
    print(
        f"{len(jobs) - len(missing_jobs)} of {len(jobs)} runs are done", file=sys.stderr, flush=True
    )
    start = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda job: _run(job, args), missing_jobs)
        for number, (job, record) in enumerate(zip(missing_jobs, runs, strict=True), start=1):
            if record is not None:
                append_records(records, [record])
            seconds_left = (time.monotonic() - start) / number * (len(missing_jobs) - number)
            state = "done" if record else f"failed, see {args.output / job.name}.log"
            print(
                f"{number}/{len(missing_jobs)} {job.name} {state}, "
                f"{seconds_left / 60:.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )
    expected_keys = set(keys.values())
    print(table([record for record in read_records(records) if _key(record) in expected_keys]))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    silence()
    from megatron_sffn.nn.routers import ROUTERS

    parser = argparse.ArgumentParser(
        prog="benchmarks.routers", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    add = parser.add_argument
    add(
        "--quickstart",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of a quick start, with data/",
    )
    add("--output", type=Path, default=Path("runs/routers"), help="folder of the runs")
    add("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--train-iters", type=int, default=150, help="steps of 2,048 tokens")
    add(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, with one thread each"
    )
    args = parser.parse_args(argv)
    if not (args.quickstart / "data" / "complete.json").is_file():
        raise ConfigError(
            f"--quickstart {args.quickstart} has no finished data sets; run make quickstart first"
        )
    return args


def _test_numbers(router: str) -> RouterTestNumbers:
    from megatron_sffn.nn.routers import ROUTERS

    return ROUTERS[router].test_numbers


def _block_sizes(router: str) -> tuple[int, ...]:
    if _test_numbers(router).single_cells:
        return (1,)
    if _test_numbers(router).square_blocks:
        return 1, BLOCK_SIZES[0]  # at g = k a token has one block, too few for several heads
    return BLOCK_SIZES[:1] if router == "dense" else BLOCK_SIZES


def _run(job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train one job; return its line of the results, None if it failed."""
    folder, data = (args.output / job.name).resolve(), (args.quickstart / "data").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = [job.flags, *COMMON]
    flags += [
        f"--train-iters {args.train_iters} --eval-interval {args.train_iters} --seed {job.seed}",
        "--tokenizer-type HuggingFaceTokenizer",
        # The last value counts: the run saves nothing before its end.
        "--save-interval 1000000",
    ]
    paths = {
        "--tokenizer-model": data / "tokenizer",
        "--train-data-path": data / "train_text_document",
        "--valid-data-path": data / "valid_text_document",
        "--data-cache-path": args.output.resolve() / "cache",
        "--save": folder,
    }
    command = [sys.executable, "-m", "megatron_sffn.pretrain", *" ".join(flags).split()]
    command += [word for flag, path in paths.items() for word in (flag, str(path))]
    with (args.output / f"{job.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    record = _record(job, folder) if code == 0 else None
    shutil.rmtree(folder)
    return record


def _record(job: Job, folder: Path) -> dict[str, Any]:
    """The results of a finished run as one line."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    blocks = [
        tokens
        for line in read_records(folder / "routing.jsonl")
        if line["phase"] == "evaluation" and line["iteration"] == summary["iterations"]
        for tokens in line["tokens_per_block"]
    ]
    names = ("iterations", "validation_perplexity", "parameters_total", "flops_per_token")
    return {
        **dataclasses.asdict(job),
        **{name: summary[name] for name in (*names, "tokens_per_second")},
        "dead_share": blocks.count(0) / len(blocks) if blocks else None,
        "torch": torch.__version__,
    }


def _key(record: dict[str, Any]) -> tuple[str, int, int, int]:
    """The key of a job in the results."""
    return record["router"], record["block_size"], record["seed"], record["iterations"]


def table(records: list[dict[str, Any]]) -> str:
    """A table with a line per router and block size, best first."""
    lines = [
        f"{'router':<15} {'g':>4} {'perplexity':>15} {'seeds':>5} {'MFLOPs/token':>12} "
        f"{'parameters':>10} {'tokens/s':>8} {'dead':>6}"
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["router"], record["block_size"]), []).append(record)
    rows = []
    for (router, g), runs in groups.items():
        values = [run["validation_perplexity"] for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(runs) > 1 else 0.0
        dead = [run["dead_share"] for run in runs if run["dead_share"] is not None]
        rate = statistics.median(run["tokens_per_second"] for run in runs)
        text = (
            f"{router:<15} {'' if router == 'dense' else g:>4} {mean:>8.1f} ± {spread:<4.1f} "
            f"{len(runs):>5} {runs[0]['flops_per_token'] / 1e6:>12.2f} "
            f"{runs[0]['parameters_total'] / 1e6:>8.1f} M {rate:>8.0f} "
            f"{f'{100 * statistics.mean(dead):.1f} %' if dead else '':>6}"
        )
        rows.append((mean, text))
    return "\n".join(lines + [text for _, text in sorted(rows)])


if __name__ == "__main__":
    run_command(main)
