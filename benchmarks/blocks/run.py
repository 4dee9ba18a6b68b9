"""Time a sparse feed-forward layer with given routing: `python -m benchmarks.blocks`.

Inputs: sizes, a dtype, a device. Outputs: a table of times over a dense FFN with the same number of
active cells, for our backends and for installed packages; the same as rows of a CSV file; and, with
`--plot`, as a plot.

Design notes:
- `layers.py` has the contenders, `problem.py` their inputs, and `timing.py` the clock.
- No contender is timed before it is checked: its output and every gradient are compared with the
  oracle in float64, at the size that is timed. If ours is wrong, the command stops. A peer that is
  wrong or cannot run has no ratio, and a line below the table gives the reason.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.agreement import DisagreementError, refusing
from benchmarks.blocks import layers
from benchmarks.blocks.problem import Problem, disagreement, reference, tolerance
from benchmarks.blocks.table import Missing, Row, plot, rows_of, table
from benchmarks.blocks.timing import Budget, alternate, step
from benchmarks.machine import ROOT, Platform, adapt, facts, one_rank, version_of
from benchmarks.rows import append, check_output, check_plot
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.backends import BACKENDS
from megatron_sffn.utils.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS, TOKENS_OF_CELLS = 2048, 1024
"""Default of --tokens; fewer at g = 1, where a peer would copy a token per active cell."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments(argv)
    if args.device == "cpu":
        # Hide GPUs before anything initialises CUDA, so that this run is the same on every machine.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    adapt()
    platform = Platform.here()
    if args.device == "cuda" and platform.devices is None:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here; run make bench, or give --device cpu"
        )
    with one_rank(platform):
        return run(args, platform)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blocks",
        description="Time of a sparse feed-forward layer with given routing, forward and "
        "forward + backward, in units of the dense FFN with the same number of active cells: ours, "
        "and the installed megatron-core, transformers and torch. A token uses k = --active-cells "
        "of E·k cells, in blocks of g. Every result is compared with a float64 oracle first; a "
        "wrong result gets no ratio.",
        epilog="example: --block-sizes 64 16 --expansions 4 --backends auto torch --no-output",
        allow_abbrev=False,
    )
    _add_sizes(parser.add_argument_group("sizes").add_argument)
    add = parser.add_argument_group("run").add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--dtype", choices=list(DTYPES), help="(default: fp32, with --device cuda bf16)")
    add(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=["auto"],
        help="our backends, with a column for each; auto is the fastest for the device (default: "
        "auto)",
    )
    add("--threads", type=int, help="threads of torch (default: 1, with --device cuda torch's own)")
    add(
        "--repeats",
        type=int,
        default=15,
        help="turns of each contender; the median counts. Slow ones get fewer, but at "
        "least 3 (default: 15)",
    )
    add(
        "--budget",
        type=float,
        default=20.0,
        help="seconds per step; a slower peer gets a dash (default: 20)",
    )
    add = parser.add_argument_group("results").add_argument
    results = ROOT / "benchmarks" / "results.csv"
    add(
        "--output",
        type=Path,
        default=results,
        help="append the rows to this CSV file (default: benchmarks/results.csv)",
    )
    add("--no-output", dest="output", action="store_const", const=None, help="print only")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot the ratios over g, a panel per E and pass",
    )
    args = parser.parse_args(argv)
    check(args)
    args.activation = Activation(args.activation)
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    if args.threads is None and args.device == "cpu":
        args.threads = 1
    return args


def _add_sizes(add: Any) -> None:
    """The flags of the layer."""
    add(
        "--block-sizes",
        type=int,
        nargs="+",
        default=[1024, 256, 64, 16, 1],
        help="g, cells per block, with a table line for each; from large to small, so that slow "
        "peers are predicted and skipped (default: 1024 256 64 16 1)",
    )
    add("--expansions", type=int, nargs="+", default=[4, 16], help="E (default: 4 16)")
    add("--hidden-size", type=int, default=512, help="D (default: 512)")
    add("--active-cells", type=int, default=2048, help="k, also of the dense FFN (default: 2048)")
    add("--tokens", type=int, help=f"T (default: {TOKENS}, {TOKENS_OF_CELLS} at g = 1)")
    add("--activation", choices=list(map(str, Activation)), default="gelu", help="(default: gelu)")
    add(
        "--gates",
        action="store_true",
        help="multiply each block's output by a factor, as most routers do, and compute its "
        "gradient; without it the peers multiply by 1, and ours does not multiply",
    )


def check(args: argparse.Namespace) -> None:
    """Check the arguments against each other, before anything is built.

    Raises:
        ConfigError: if a value cannot work.
    """
    names = ("block_sizes", "expansions", "hidden_size", "active_cells", "tokens", "threads")
    for name in (*names, "repeats"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value} is less than 1; give at least 1")
    if not args.budget > 0:
        raise ConfigError(f"--budget {args.budget:g} is no time; give seconds above 0")
    for size in args.block_sizes:
        if args.active_cells % size:
            raise ConfigError(
                f"--block-sizes {size} does not divide --active-cells {args.active_cells}; give a "
                f"divisor, such as {math.gcd(size, args.active_cells)}"
            )
    if args.output:
        check_output(args.output, Row)
    if args.plot:
        check_plot(args.plot)


def run(args: argparse.Namespace, platform: Platform) -> int:
    """Measure all sizes in a process with Megatron's process groups; print, append and plot.

    Raises:
        DisagreementError: if our result is wrong.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    common = common_of(args, platform)
    contenders = [*(our_name(backend) for backend in args.backends), *layers.peers()]
    rows: list[Row] = []
    missing: list[Missing] = []
    for expansion in args.expansions:
        budget = Budget(seconds=args.budget)
        for block_size in args.block_sizes:
            new_rows, new_missing = measure(args, expansion, block_size, budget, common)
            if args.output:
                append(new_rows, args.output)
            rows += new_rows
            missing += new_missing
    print(table(rows, missing, contenders), flush=True)
    if args.plot:
        plot(rows, contenders, args.plot)
    return 0


def our_name(backend: str) -> str:
    """The name of one of our backends in the table."""
    return "ours" if backend == "auto" else f"ours {backend}"


def measure(
    args: argparse.Namespace,
    expansion: int,
    block_size: int,
    budget: Budget,
    common: dict[str, Any],
) -> tuple[list[Row], list[Missing]]:
    """Check, then time, all contenders at one size."""
    problem = Problem.draw(
        tokens=args.tokens or (TOKENS if block_size > 1 else TOKENS_OF_CELLS),
        hidden_size=args.hidden_size,
        active_cells=args.active_cells,
        block_size=block_size,
        expansion=expansion,
        activation=args.activation,
        dtype=DTYPES[args.dtype],
        gated=args.gates,
        device=torch.cuda.current_device(),
    )
    print(f"g = {block_size}, E = {expansion}: comparing", file=sys.stderr, flush=True)
    expected = reference(problem)
    modules: dict[str, nn.Module] = {"dense": layers.Dense(problem)}
    for backend in args.backends:
        modules[our_name(backend)] = module = layers.BlockFFN(problem, backend)
        error = difference(module, problem, expected)
        if not error <= tolerance(problem):
            raise DisagreementError(
                f"{our_name(backend)} is wrong at g = {block_size}, E = {expansion}: it differs "
                f"from the oracle by {error:.1e} of the norm, more than {tolerance(problem):.0e}; "
                "no ratios are printed"
            )
    missing = []
    for name, build in layers.peers().items():
        peer = attempt(name, build, problem, expected, budget)
        if isinstance(peer, nn.Module):
            modules[name] = peer
        else:
            missing.append(
                Missing(contender=name, block_size=block_size, expansion=expansion, reason=peer)
            )
    del expected
    print(f"g = {block_size}, E = {expansion}: timing", file=sys.stderr, flush=True)
    size = {"block_size": block_size, "expansion": expansion, "tokens": len(problem.x)}
    return rows_of(alternate(modules, problem, args.repeats), {**common, **size}), missing


def attempt(
    name: str,
    build: Callable[[Problem], nn.Module],
    problem: Problem,
    expected: dict[str, torch.Tensor],
    budget: Budget,
) -> nn.Module | str:
    """Build a peer and run it once; return its module, or the reason why it cannot be timed."""
    if reason := budget.refusal(name, problem):
        return reason
    try:
        module = build(problem)
        start = time.perf_counter()
        error = difference(module, problem, expected)
        seconds = time.perf_counter() - start
    except Exception as refused:  # any error of another package is its reason
        return " ".join(f"{type(refused).__name__}: {refused}".splitlines())[:200]
    if not error <= tolerance(problem):
        return (
            f"wrong: it differs from the oracle by {error:.1e} of the norm, more than "
            f"{tolerance(problem):.0e}"
        )
    return budget.note(name, problem, seconds) or module


def difference(module: Any, problem: Problem, expected: dict[str, torch.Tensor]) -> float:
    """The relative difference of a contender's output and gradients from the oracle's."""
    y, dx = step(module, problem.x, problem.dy)
    error = disagreement({"y": y, "x": dx, **module.gradients()}, expected)
    module.zero_grad(set_to_none=True)
    return error


def common_of(args: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    """The columns that are the same in all rows of a run."""
    return {
        **facts(platform, args.output),
        "threads": torch.get_num_threads(),
        "transformer_engine": version_of("transformer-engine"),
        "transformers": version_of("transformers"),
        "triton": version_of("triton"),
        "dtype": args.dtype,
        "activation": str(args.activation),
        "gated": args.gates,
        "hidden_size": args.hidden_size,
        "active_cells": args.active_cells,
    }


def command() -> int:
    """Run `main` as a command."""
    return refusing(main)
