"""Time one sparse layer on several ranks, ours and Megatron's: `python -m benchmarks.parallel`.

Inputs: the sizes of a layer, block sizes and numbers of ranks. Outputs: a table of ratios per
number of ranks, and, with `--output`, the same rows appended to a CSV file; with `--plot`, a plot.

Design notes: everything that is compared runs in one command, in turns, in the same processes.
Times are ratios to a dense FFN or to each other, because absolute times say more about the machine
than about a layer. Ranks are processes of this host: over NCCL with GPUs, else over gloo.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from benchmarks.agreement import DisagreementError, refusing
from benchmarks.machine import Platform, adapt
from benchmarks.parallel.table import Row, plot, table
from benchmarks.rows import append, check_output, check_plot
from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.parallel.contenders import Measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments(argv)
    # Set before torch is imported, as torchrun does: ranks share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    adapt()
    platform = Platform.here()
    from benchmarks.parallel.contenders import DISPATCHERS

    for ranks in args.ranks:
        check_devices(ranks, platform)
    all_rows = []
    for ranks in args.ranks:
        measured = measure(ranks, args, platform)
        check_agreement(ranks, measured)
        rows = [
            row_of(rank_results, dispatcher, args, platform)
            for rank_results in measured
            for dispatcher in DISPATCHERS
        ]
        print(table(rows), flush=True)
        if args.output:
            append(rows, args.output)
        all_rows += rows
    if args.plot:
        plot(all_rows, args.plot)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel",
        description="Time of one sparse layer over ranks and the bytes that it sends, ours and "
        "Megatron's MoE layer, with the same weights and the switch router.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hidden-size", type=int, default=256, help="D (default: 256)")
    add("--active-cells", type=int, default=1024, help="k, also of the dense FFN (default: 1024)")
    add("--expansion", type=int, default=4, help="E, all cells over active cells (default: 4)")
    add("--tokens", type=int, default=1024, help="T of each rank and step (default: 1024)")
    add(
        "--block-sizes",
        type=int,
        nargs="+",
        default=[1024, 256, 64, 16],
        help="g, with table rows for each (default: 1024 256 64 16)",
    )
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        help="numbers of ranks, with a table for each (default: 2 4)",
    )
    add(
        "--repeats",
        type=int,
        default=15,
        help="steps of each layer; the median counts. Slow layers get fewer (default: 15)",
    )
    add("--output", type=Path, help="append the rows to this CSV file")
    add("--plot", type=Path, help="plot the counted bytes over g, a panel per --ranks (.png)")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Check the arguments against each other, before any process starts.

    Raises:
        ConfigError: if a value cannot work.
    """
    for name in ("hidden_size", "active_cells", "expansion", "repeats", "block_sizes"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value} is less than 1; give at least 1")
    for ranks in args.ranks:
        if ranks < 2:
            raise ConfigError(f"--ranks {ranks} has nothing to exchange; give at least 2")
        if args.tokens < ranks:
            raise ConfigError(
                f"--tokens {args.tokens} is less than --ranks {ranks}; give at least {ranks}"
            )
    for size in args.block_sizes:
        if args.active_cells % size:
            raise ConfigError(
                f"--block-sizes {size} does not divide --active-cells {args.active_cells}; give a "
                f"divisor, such as {math.gcd(size, args.active_cells)}"
            )
        blocks = args.expansion * args.active_cells // size
        for ranks in args.ranks:
            if blocks % ranks:
                raise ConfigError(
                    f"--ranks {ranks} does not divide the {blocks} blocks of --block-sizes {size}; "
                    f"give --expansion {ranks} or other --ranks"
                )
    if args.output:
        check_output(args.output, Row)
    if args.plot:
        check_plot(args.plot)


def check_devices(ranks: int, platform: Platform) -> None:
    """Check that every rank can have a device of its own.

    Raises:
        ConfigError: if there are too few.
    """
    if platform.devices is not None and ranks > platform.devices:
        raise ConfigError(
            f"--ranks {ranks} is more than this machine's {platform.devices} GPUs; give fewer, or "
            "set CUDA_VISIBLE_DEVICES= (empty) to measure on the CPU"
        )


def measure(ranks: int, args: argparse.Namespace, platform: Platform) -> list[list[Measured]]:
    """Start ranks and measure: for each block size, the measurements of every rank."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.start_processes(
            run_rank,
            (ranks, args, folder, platform.backend),
            nprocs=ranks,
            start_method=platform.start_method,
        )
        # Safe to unpickle: our own ranks have just written it.
        results = [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(ranks)]
    return [list(rank_results) for rank_results in zip(*results, strict=True)]


def run_rank(rank: int, ranks: int, args: argparse.Namespace, folder: Path, backend: str) -> None:
    """One rank: join the others, measure every block size, save the result in the folder."""
    adapt()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from benchmarks.parallel import contenders
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.routers.switch import SwitchConfig

    torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ranks, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1)
    results = []
    for block_size in args.block_sizes:
        sffn = SparseFFNConfig(
            active_cells=args.active_cells,
            block_size=block_size,
            expansion=args.expansion,
            router=SwitchConfig(),
        )
        results.append(
            contenders.measure(
                sffn, hidden_size=args.hidden_size, tokens=args.tokens, repeats=args.repeats
            )
        )
    _result(folder, rank).write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result{rank}"


def check_agreement(ranks: int, measured: Sequence[Sequence[Measured]]) -> None:
    """Refuse to compare layers that computed different results.

    Raises:
        DisagreementError: at the first block size at which they differ.
    """
    from benchmarks.parallel.contenders import TOLERANCE

    for rank_results in measured:
        worst, size = rank_results[0].disagreement, rank_results[0].sffn.block_size
        if not worst <= TOLERANCE:
            raise DisagreementError(
                f"on {ranks} ranks at g = {size} the layers differ by {worst:.1e} of the largest "
                f"value, more than {TOLERANCE:.0e}, with the same weights; no ratios are printed"
            )


def row_of(
    rank_results: Sequence[Measured], dispatcher: str, args: argparse.Namespace, platform: Platform
) -> Row:
    """The measurements of all ranks at one block size and dispatcher, as a row."""
    import torch

    from benchmarks.parallel.contenders import DISPATCHERS, name_of

    first = rank_results[0]
    time = {name: _median_of_slowest(name, rank_results) for name in first.seconds}
    sent = {
        name: mean(rank.sent[name] for rank in rank_results) / args.tokens for name in first.sent
    }
    our_name, megatron_name = name_of("ours", dispatcher), name_of("Megatron", dispatcher)
    fastest = min(time[name_of("Megatron", name)] for name in DISPATCHERS)
    return Row(
        device=platform.device,
        transport=platform.backend,
        torch=torch.__version__,
        megatron_core=importlib.metadata.version("megatron-core"),
        ranks=len(rank_results),
        tokens=args.tokens,
        hidden_size=args.hidden_size,
        active_cells=args.active_cells,
        expansion=args.expansion,
        block_size=first.sffn.block_size,
        active_blocks=first.sffn.num_active_blocks,
        blocks=first.sffn.num_blocks,
        dispatcher=dispatcher,
        chosen=dispatcher == first.chosen,
        repeats=len(first.seconds["dense"]),
        dense_ms=1000 * time["dense"],
        ours_over_dense=time[our_name] / time["dense"],
        megatron_over_dense=time[megatron_name] / time["dense"],
        megatron_over_ours=time[megatron_name] / time[our_name],
        best_megatron_over_ours=fastest / time[our_name],
        ours_bytes=sent[our_name],
        ours_closed_form=first.closed_form[our_name],
        megatron_bytes=sent[megatron_name],
        megatron_closed_form=first.closed_form[megatron_name],
        bytes_megatron_over_ours=sent[megatron_name] / sent[our_name],
        rows_over_dense=time["rows"] / time["dense"],
        latency_over_dense=time["row"] / time["dense"],
    )


def _median_of_slowest(name: str, rank_results: Sequence[Measured]) -> float:
    """The median over steps of the slowest rank, which ends the step."""
    return median(map(max, zip(*(rank.seconds[name] for rank in rank_results), strict=True)))


def command() -> int:
    """Run `main` as a command."""
    return refusing(main)
