"""Times batches of Megatron's torch loader and of DALI's: `python -m benchmarks.loading`.

Inputs: a data set, or none to make one from the source of Python's library, one token per byte.
Outputs: a table of tokens per second and of the wait for a batch between steps, and, with
`--output`, rows of a CSV file.

Design notes:
- Batches take the path of a run: Megatron's data sets, its sampler, its iterators, and the copy to
  the device that a step makes.
- A step is a sleep, during which a loader works at no cost, as on a GPU. If steps compute on the
  same cores, compare tokens per second instead.
- Both loaders must give the same batches before anything is timed. Contenders take turns, and
  the best of `--rounds` counts, because other load on a machine only adds time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import sysconfig
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.agreement import DisagreementError, refusing
from benchmarks.machine import Platform, adapt, facts, one_rank, version_of
from benchmarks.rows import append, check_output
from megatron_sffn.utils.errors import ConfigError, run_command

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP = 20
"""Batches of every contender to warm up, which are not timed."""


COMPARED = 5
"""Batches that are compared between both loaders before anything is timed."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """A contender.

    Args:
        loader: `torch` or `dali`.
        workers: processes of torch's loader, threads of DALI's.
    """

    loader: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The measurements of one round.

    Args:
        tokens_per_second: speed of drawing batches without steps between them.
        first_ms: time to the first batch.
        wait_ms: wait for a batch between two steps.
    """

    tokens_per_second: float
    first_ms: float
    wait_ms: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of a contender; also the columns of the CSV file.

    Args:
        date: date of the command, ISO 8601, UTC.
        commit: short hash; `-dirty` if files differ from it.
        device: name of the device.
        torch: version.
        megatron_core: version.
        dali: version.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a batch.
        step_ms: duration of the simulated step.
        loader: see `Loader`.
        workers: see `Loader`.
        tokens_per_second: see `Timing`.
        first_ms: see `Timing`.
        wait_ms: see `Timing`.
    """

    date: str
    commit: str
    device: str
    torch: str
    megatron_core: str
    dali: str
    seq_length: int
    micro_batch_size: int
    step_ms: float
    loader: str
    workers: int
    tokens_per_second: float
    first_ms: float
    wait_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, then time all contenders, then print the table."""
    options = parse_arguments(argv)
    adapt()
    # Ignore warnings about pinned memory without a GPU, and about use outside of a run.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    platform = Platform.here()
    loaders = [
        Loader(loader=kind, workers=n) for kind in ("torch", "dali") for n in options.workers
    ]
    with tempfile.TemporaryDirectory() as folder, one_rank(platform):
        args = run_of(options, Path(folder))
        compare(args)
        best: dict[Loader, Timing] = {}
        for turn in range(options.rounds):
            for loader in loaders:
                print(f"round {turn + 1}: {loader}", file=sys.stderr, flush=True)
                timing = time_round(args, loader, options)
                best[loader] = max(best.get(loader, timing), timing, key=by_throughput)
    print(table(best, platform, options))
    if options.output:
        common: dict[str, Any] = {
            **facts(platform, options.output),
            "dali": version_of("nvidia-dali-cuda130"),
        }
        sizes = {name: vars(options)[name] for name in SIZES}
        rows = [
            Row(**common, **sizes, **asdict(loader), **asdict(best[loader])) for loader in loaders
        ]
        append(rows, options.output)
    return 0


SIZES = ("seq_length", "micro_batch_size", "step_ms")
"""Options that are columns of the CSV file."""


def by_throughput(timing: Timing) -> float:
    """The measure by which the best round is chosen."""
    return timing.tokens_per_second


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        ConfigError: if a value cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description="Tokens per second of Megatron's torch loader and of --sffn-dataloader dali.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data-path",
        nargs="+",
        metavar="X",
        help="as in a run: PREFIX, or WEIGHT PREFIX ... (default: the source of this Python's "
        "library, one token per byte)",
    )
    add("--seq-length", type=int, default=2048, help="tokens (default: 2048)")
    add("--micro-batch-size", type=int, default=8, help="sequences (default: 8)")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="--num-workers (default: 0 1 2)")
    add(
        "--batches",
        type=int,
        default=200,
        help="batches to time, in a row and between steps (default: 200)",
    )
    add("--step-ms", type=float, default=10.0, help="duration of a simulated step (default: 10)")
    add("--rounds", type=int, default=3, help="rounds of each loader; the best counts (default: 3)")
    add("--mask", action="store_true", help="with the attention mask, s x s bytes per sequence")
    add("--output", type=Path, help="append the rows to this CSV file")
    options = parser.parse_args(argv)
    for name in ("seq_length", "micro_batch_size", "batches", "rounds"):
        if vars(options)[name] < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {vars(options)[name]} is less than 1; give at least 1")
    if min(options.workers) < 0:
        raise ConfigError(f"--workers {min(options.workers)} is less than 0; give 0 or more")
    if options.output:
        check_output(options.output, Row)
    return options


def run_of(options: argparse.Namespace, folder: Path) -> Namespace:
    """The arguments of a run that reads the data, after Megatron has been initialised with them."""
    from megatron.training.global_vars import set_global_variables

    from megatron_sffn.checks.data import check_data
    from megatron_sffn.patches import prepare
    from megatron_sffn.train.arguments import parse

    batches = WARM_UP + 2 * options.batches
    paths = options.data_path or [library_dataset(folder / "library")]
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    sys.argv = [
        "pretrain",
        *MODEL.split(),
        *("--seq-length", str(options.seq_length)),
        *("--max-position-embeddings", str(options.seq_length)),
        *("--micro-batch-size", str(options.micro_batch_size), "--train-iters", str(batches)),
        *("--data-path", *paths, "--data-cache-path", str(folder / "cache")),
        *([] if options.mask else ["--no-create-attention-mask-in-dataloader"]),
    ]
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # hides what Megatron prints about its arguments
        args = parse(prepare()[0])
        args.sffn_dataloader = "dali"  # raises an error if DALI is not installed
        check_data(args)
        set_global_variables(args)
    args.iteration = 0
    return args


MODEL = (
    "--num-layers 1 --hidden-size 64 --num-attention-heads 1 --sffn-router dense --lr 1e-3 "
    "--tokenizer-type NullTokenizer --vocab-size 1000000 --split 100,0,0 --eval-iters 0"
)
"""Flags of a model that is not built, with a vocabulary that is large enough for any id."""


def library_dataset(prefix: Path) -> str:
    """Write a data set from Python's library, a document per file; return its prefix."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py")):
        data = numpy.frombuffer(path.read_bytes(), dtype=numpy.uint8)
        builder.add_document(data, [len(data)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def batches_of(args: Namespace, loader: Loader) -> Iterator[dict[str, Tensor]]:
    """Training batches, through Megatron, on the device of a step."""
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_sffn.data.loading.gpt_dataset import datasets_provider

    args.sffn_dataloader, args.num_workers = loader.loader, loader.workers
    args.dataloader_type = "single"
    with contextlib.redirect_stdout(io.StringIO()):
        provider = datasets_provider(on_every_stage=False)
        iterator = build_train_valid_test_data_iterators(provider)[0]
    while True:
        yield {name: value.cuda(non_blocking=True) for name, value in next(iterator).items()}


def compare(args: Namespace) -> None:
    """Check that both loaders give the same first batches.

    Raises:
        DisagreementError: if they do not.
    """
    import torch

    dali_batches, torch_batches = (
        batches_of(args, Loader(loader=kind, workers=0)) for kind in ("dali", "torch")
    )
    for number in range(COMPARED):
        dali_batch, torch_batch = next(dali_batches), next(torch_batches)
        if not all(torch.equal(value, torch_batch[name]) for name, value in dali_batch.items()):
            raise DisagreementError(f"batch {number} of DALI differs from that of torch's loader")


def time_round(args: Namespace, loader: Loader, options: argparse.Namespace) -> Timing:
    """Time one round of a contender."""
    import torch

    start = time.perf_counter()
    batches = batches_of(args, loader)
    next(batches)
    first_seconds = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        next(batches)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    torch.cuda.synchronize()
    tokens = options.batches * options.micro_batch_size * options.seq_length
    rate = tokens / (time.perf_counter() - start)
    wait_seconds = 0.0
    for _ in range(options.batches):
        time.sleep(options.step_ms / 1000)
        start = time.perf_counter()
        next(batches)
        torch.cuda.synchronize()
        wait_seconds += time.perf_counter() - start
    return Timing(
        tokens_per_second=rate,
        first_ms=1000 * first_seconds,
        wait_ms=1000 * wait_seconds / options.batches,
    )


def table(best: dict[Loader, Timing], platform: Platform, options: argparse.Namespace) -> str:
    """A table with a row per contender."""
    lines = [
        f"batches of {options.micro_batch_size} sequences of {options.seq_length} tokens; "
        f"{platform.device}",
        f"{'loader':<8}{'workers':>7}{'tokens/s':>14}{'first batch':>13}"
        f"{f'wait between steps of {options.step_ms:g} ms':>34}",
    ]
    for loader, timing in best.items():
        lines.append(
            f"{loader.loader:<8}{loader.workers:>7}{timing.tokens_per_second:>14,.0f}"
            f"{timing.first_ms:>10.0f} ms{timing.wait_ms:>31.2f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(lambda: refusing(main))
