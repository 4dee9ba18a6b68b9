"""Times whole training steps of a sparse model over a dense one: `python -m benchmarks.steps`.

Inputs: sizes. Outputs: a table of ratios, ours beside Megatron's own dispatcher and experts
(`--sffn-backend megatron`: same router, same B, K and g), over a dense model with the same number
of active cells; how a step grows with the number of cells (E) and of tokens, as a table and, with
`--plot`, as a plot; and, with `--output`, the times as rows of a CSV file.

Design notes:
- Runs are real: `megatron_sffn.pretrain` on one rank with Megatron's mock data, which costs nothing
  to read; forward, backward, optimizer and the rest of Megatron's loop count.
- Runs take turns, `--rounds` times. The median step of a run counts, and the fastest round, because
  other load on a machine only adds time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Platform, adapt, facts
from benchmarks.rows import append, check_output, check_plot
from benchmarks.trainings import tokens_per_second
from megatron_sffn.utils.errors import ConfigError, run_command

SEQUENCE = 256
"""Tokens per sequence."""

COMMON = (
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --sffn-router switch "
    "--num-attention-heads 4 --position-embedding-type rope --normalization RMSNorm "
    "--disable-bias-linear --mock-data --tokenizer-type NullTokenizer --vocab-size 4096 --lr 1e-3 "
    "--num-workers 0 --no-create-attention-mask-in-dataloader --eval-iters 0 "
    "--eval-interval 1000000 --save-interval 1000000 --log-interval 1000000"
)
"""Flags of every run besides its sizes; a later `--sffn-router dense` overrides the router."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The configuration of a run.

    Args:
        backend: `ours`, `megatron` or `dense`.
        block_size: g; 0 for dense.
        expansion: E; 1 for dense.
        tokens: tokens of a step.
    """

    backend: str
    block_size: int = 0
    expansion: int = 1
    tokens: int

    def flags(self) -> str:
        """The flags of the feed-forward layer and the batch."""
        sequences = self.tokens // SEQUENCE
        batch = f"--micro-batch-size {sequences} --global-batch-size {sequences}"
        if self.backend == "dense":
            return f"{batch} --sffn-router dense"
        backend = "auto" if self.backend == "ours" else self.backend
        return (
            f"{batch} --sffn-block-size {self.block_size} --sffn-expansion {self.expansion} "
            f"--sffn-backend {backend}"
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run's step; also the columns of the CSV file.

    Args:
        date: date of the command, ISO 8601, UTC.
        commit: short hash; `-dirty` if files differ from it.
        device: name of the device.
        torch: version.
        megatron_core: version.
        num_layers: number of layers, which are all sparse or all dense.
        hidden_size: D.
        active_cells: k.
        backend: see `Step`.
        block_size: g.
        expansion: E.
        tokens: tokens of a step.
        ms: milliseconds of a step.
    """

    date: str
    commit: str
    device: str
    torch: str
    megatron_core: str
    num_layers: int
    hidden_size: int
    active_cells: int
    backend: str
    block_size: int
    expansion: int
    tokens: int
    ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps, then print the tables."""
    args = parse_arguments(argv)
    adapt()
    common = facts(Platform.here(), args.output)
    steps = steps_of(args)
    ms_of_step = dict.fromkeys(steps, float("inf"))
    for turn in range(args.rounds):
        for number, step in enumerate(steps, start=1):
            print(f"round {turn + 1}, {number}/{len(steps)} {step}", file=sys.stderr, flush=True)
            ms_of_step[step] = min(milliseconds(step, args), ms_of_step[step])
    print(comparison(ms_of_step, args))
    print()
    print(growth(ms_of_step, args))
    if args.output:
        append([row_of(step, ms, args, common) for step, ms in ms_of_step.items()], args.output)
    if args.plot:
        plot(ms_of_step, args)
    return 0


def row_of(step: Step, ms: float, args: argparse.Namespace, common: dict[str, Any]) -> Row:
    """The time of a run's step as a row."""
    return Row(
        **common,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        active_cells=4 * args.hidden_size,
        **vars(step),
        ms=ms,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        ConfigError: if a value cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description="Time of a whole training step of a sparse model, ours and with Megatron's own "
        "experts, over a dense one of as many active cells; and how it grows.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--block-sizes",
        type=int,
        nargs="+",
        default=[1024, 256, 64, 16],
        help="g (default: 1024 256 64 16)",
    )
    add("--expansion", type=int, default=16, help="E in the comparison with Megatron (default: 16)")
    add(
        "--expansions",
        type=int,
        nargs="+",
        default=[4, 16, 64],
        help="E of the growth table (default: 4 16 64)",
    )
    add("--tokens", type=int, default=2048, help=f"in sequences of {SEQUENCE} (default: 2048)")
    add("--num-layers", type=int, default=4, help="all of them sparse (default: 4)")
    add("--hidden-size", type=int, default=256, help="D; k = 4 D active cells (default: 256)")
    add("--train-iters", type=int, default=8, help="steps of a run (default: 8)")
    add("--rounds", type=int, default=2, help="runs of each configuration (default: 2)")
    add("--output", type=Path, help="append the rows to this CSV file")
    add("--plot", type=Path, metavar="FILE.png", help="plot the growth")
    args = parser.parse_args(argv)
    if args.tokens < SEQUENCE or args.tokens % SEQUENCE:
        raise ConfigError(
            f"--tokens {args.tokens} is not a multiple of {SEQUENCE}; give whole sequences"
        )
    for g in args.block_sizes:
        if g < 1 or 4 * args.hidden_size % g:
            raise ConfigError(
                f"--block-sizes {g} does not divide the {4 * args.hidden_size} active cells of "
                f"--hidden-size {args.hidden_size}; choose a divisor"
            )
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} is less than 1; give at least 1")
    if args.output:
        check_output(args.output, Row)
    if args.plot:
        check_plot(args.plot)
    return args


def steps_of(args: argparse.Namespace) -> list[Step]:
    """Every run that the tables need, once: dense, ours and Megatron, and the growth."""
    tokens = args.tokens
    dense = [Step(backend="dense", tokens=t) for t in (tokens, 2 * tokens)]
    compared = [
        Step(backend=backend, block_size=g, expansion=args.expansion, tokens=tokens)
        for g in args.block_sizes
        for backend in ("ours", "megatron")
    ]
    grown = [
        Step(backend="ours", block_size=g, expansion=e, tokens=t)
        for g in args.block_sizes
        for e, t in growth_sizes(args)
    ]
    return list(dict.fromkeys([*dense, *compared, *grown]))


def growth_sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """E and tokens of the growth table: every E, and the largest E with twice the tokens."""
    return [*((e, args.tokens) for e in args.expansions), (max(args.expansions), 2 * args.tokens)]


def milliseconds(step: Step, args: argparse.Namespace, extra: Sequence[str] = ()) -> float:
    """The median step of a run.

    Args:
        step: its configuration.
        args: sizes of the model.
        extra: more flags of the run.

    Raises:
        ConfigError: if the run fails.
    """
    sizes = (
        f"--num-layers {args.num_layers} --hidden-size {args.hidden_size} "
        f"--ffn-hidden-size {4 * args.hidden_size} --train-iters {args.train_iters}"
    )
    flags = [*f"{COMMON} {sizes} {step.flags()}".split(), *extra]
    return 1000 * step.tokens / tokens_per_second(step, flags)


def comparison(ms_of_step: Mapping[Step, float], args: argparse.Namespace) -> str:
    """The table of our and Megatron's steps over dense ones."""
    dense = ms_of_step[Step(backend="dense", tokens=args.tokens)]
    lines = [
        f"a step of {args.tokens} tokens: {args.num_layers} layers, D = {args.hidden_size}, "
        f"k = {4 * args.hidden_size}, E = {args.expansion}; dense {dense:.0f} ms",
        f"{'g':>5} {'K':>4} {'B':>5} {'ours /dense':>12} {'Megatron /dense':>16} "
        f"{'Megatron /ours':>15}",
    ]
    for g in args.block_sizes:
        our_ms, megatron_ms = (
            ms_of_step[
                Step(backend=name, block_size=g, expansion=args.expansion, tokens=args.tokens)
            ]
            for name in ("ours", "megatron")
        )
        active = 4 * args.hidden_size // g
        lines.append(
            f"{g:>5} {active:>4} {active * args.expansion:>5} {our_ms / dense:>12.2f} "
            f"{megatron_ms / dense:>16.2f} {megatron_ms / our_ms:>15.2f}"
        )
    return "\n".join(lines)


def growth(ms_of_step: Mapping[Step, float], args: argparse.Namespace) -> str:
    """The table of our steps over dense ones with as many tokens, at every E."""
    heads = [f"E={e}" if t == args.tokens else f"E={e}, {t} tokens" for e, t in growth_sizes(args)]
    lines = ["ours over dense of as many tokens, as the memory grows"]
    lines.append(f"{'g':>5} " + " ".join(f"{head:>16}" for head in heads))
    for g in args.block_sizes:
        ratios = [over_dense(ms_of_step, g, e, t) for e, t in growth_sizes(args)]
        lines.append(f"{g:>5} " + " ".join(f"{ratio:>16.2f}" for ratio in ratios))
    return "\n".join(lines)


def over_dense(
    ms_of_step: Mapping[Step, float], block_size: int, expansion: int, tokens: int
) -> float:
    """The time of one of our steps over a dense one with as many tokens."""
    step = Step(backend="ours", block_size=block_size, expansion=expansion, tokens=tokens)
    return ms_of_step[step] / ms_of_step[Step(backend="dense", tokens=tokens)]


def plot(ms_of_step: Mapping[Step, float], args: argparse.Namespace) -> None:
    """Plot the step time over E, a line per block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for g in args.block_sizes:
        times = [over_dense(ms_of_step, g, e, args.tokens) for e in args.expansions]
        axes.plot(args.expansions, times, marker="o", label=f"g = {g}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="E, memory cells over active cells", ylabel="time of a step over dense")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    run_command(main)
