"""Plans a run on a cluster: the layouts that fit, their memory, traffic, time, cost, and the loss.

Inputs: the flags of `megatron_sffn.pretrain`, and the cluster. Outputs: a table of the best layouts
with reasons, JSON or CSV, tables over numbers of GPUs and block sizes, a plot.

Design notes: the flags go through the run's own parser and checks, so that a layout of the table
would start. All numbers are closed forms of `megatron_sffn.accounting` and
`megatron_sffn.planning`; neither the tokenizer nor the data is read. What is derived and what was
measured is in docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sffn.utils.errors import CommandParser, ConfigError, require, run_command
from megatron_sffn.utils.tool_output import add_form_flags, print_records
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.planning.candidates import Base, Candidate
    from megatron_sffn.planning.cluster import Cluster
    from megatron_sffn.planning.fitted_loss import FittedSurfaces
    from megatron_sffn.planning.loss import Foreseen
    from megatron_sffn.planning.report import Case

DESCRIPTION = """\
Find the best layout of a run on a cluster, before a GPU is rented: for every valid TP, PP, chunks
per stage, EP, ETP and microbatch it computes memory, traffic, time of a step, and the days and the
cost of a budget of tokens. It takes the options below and every flag of `python -m
megatron_sffn.pretrain` (see its --help-all); --global-batch-size and --vocab-size (or
--padded-vocab-size) are required. A size of the layout that a flag gives is kept, and so is
--recompute-granularity; without it, each layout recomputes no more than it needs to fit. Times are
derived from a model, not measured; --check compares the model with published runs.
"""

EPILOG = """\
example: a run on 64 H100
  .venv/bin/python tools/plan.py --gpus 64 --gpu h100 --price 2.50 --tokens 300e9 \\
      --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 \\
      --max-position-embeddings 4096 --vocab-size 50257 --global-batch-size 1024 --bf16 \\
      --use-distributed-optimizer

example: how many GPUs, which block size (add the flags of the model)
  .venv/bin/python tools/plan.py ... --compare-gpus 8,64,512,4096
  .venv/bin/python tools/plan.py ... --compare-block-sizes 4096,256,64 --plot cost.png

example: which block size at what cost, and what loss to expect of it
  .venv/bin/python tools/plan.py ... --tokens 300e9 --compare-block-sizes 1024,256,64 --loss
  .venv/bin/python tools/plan.py ... --tokens 300e9 --loss-from studies/block-size/report

example: how far the model is from published throughput
  .venv/bin/python tools/plan.py --check
"""

PLOTTED_GPUS = [2**power for power in range(3, 14)]
"""Numbers of GPUs in a plot, without --compare-gpus: 8 to 8,192."""

OVERRIDES = {
    "peak_flops": ("--peak-flops", 1e12, "TFLOP/s", "dense bf16 peak of a GPU"),
    "memory": ("--gpu-memory", 1e9, "GB", "memory of a GPU"),
    "memory_bandwidth": ("--memory-bandwidth", 1e9, "GB/s", "bandwidth of a GPU's memory"),
    "node_bandwidth": ("--node-bandwidth", 1e9, "GB/s", "a GPU's, one way, within its node"),
    "network_bandwidth": ("--network-bandwidth", 1e9, "GB/s", "a GPU's, one way, to other nodes"),
}
"""Field of `Card` -> flag, factor of its unit, unit, help."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the tool's own flags."""
    parser = CommandParser(
        prog="tools/plan.py",
        usage="tools/plan.py [options] [flags of megatron_sffn.pretrain]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of the run (default: 8)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    cards = ("a100", "h100", "h200", "b200")
    add("--gpu", choices=cards, default="h100", help="the card (default: h100)")
    for flag, _, unit, text in OVERRIDES.values():
        add(flag, type=float, metavar=unit, help=f"{text} (default: the card's)")
    add(
        "--efficiency",
        type=float,
        metavar="X",
        help="achieved over peak FLOP/s of a large dense product, as measured on the card "
        "(default: 0.73, assumed)",
    )
    add(
        "--block-ratio",
        type=float,
        metavar="X",
        help="time of a sparse layer's block products over those of a dense layer with as many "
        "active cells, as measured on the card at this block size (default: derived)",
    )
    add("--price", type=float, metavar="P", help="price of a GPU hour, in any currency")
    add("--tokens", type=float, metavar="N", help="budget of tokens, such as 300e9")
    add("--top", type=int, default=10, metavar="N", help="layouts to print (default: 10)")
    add("--compare-gpus", metavar="N,M,...", help="the best layout of each number of GPUs")
    add("--compare-block-sizes", metavar="G,H,...", help="the best of each --sffn-block-size")
    add(
        "--loss",
        action="store_true",
        help="also print the final loss that published laws foresee for the model and --tokens, "
        "and their range; they were fitted to other data, so trust differences, not values",
    )
    add(
        "--loss-from",
        type=Path,
        metavar="REPORT",
        help="as --loss, and also the loss by the surface that megatron-sffn report fitted to "
        "your own runs, with its bootstrap spread: the folder of the report, or its report.json "
        "(extra study)",
    )
    add(
        "--loss-series",
        metavar="NAME",
        help="the surface of the report to use, where it has several of the router, such as "
        "'avg-k, expansion 16'",
    )
    add("--check", action="store_true", help="compare the model with published runs, and end")
    add_form_flags(parser)
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot the cost over the number of GPUs, 8 to 8,192 without --compare-gpus, and over "
        "the block sizes of --compare-block-sizes; also as .svg (needs --tokens)",
    )
    return parser


def cluster_of(options: Namespace, gpus: int) -> Cluster:
    """The cluster that the options describe."""
    from megatron_sffn.planning.cluster import CARDS, EFFICIENCY, Cluster

    given = {
        name: getattr(options, flag[2:].replace("-", "_")) for name, (flag, *_) in OVERRIDES.items()
    }
    numbers = {
        name: value * OVERRIDES[name][1] for name, value in given.items() if value is not None
    }
    return Cluster(
        gpus=gpus,
        gpus_per_node=options.gpus_per_node,
        card=dataclasses.replace(CARDS[options.gpu], **numbers),
        efficiency=EFFICIENCY if options.efficiency is None else options.efficiency,
        price=options.price,
        block_ratio=options.block_ratio,
    )


def shown(candidates: list[Candidate]) -> Iterable[Candidate]:
    """The layouts, with a progress bar on a terminal."""
    from tqdm import tqdm

    bar: Iterable[Candidate] = tqdm(
        candidates, desc="layouts", unit="", leave=False, disable=not sys.stderr.isatty()
    )
    return bar


def numbers_in(flag: str, text: str | None) -> list[int]:
    """The numbers of a comma-separated list; none if the flag is not given."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{flag} {text} is not a list of numbers; write for example 8,64,512")
    return list(dict.fromkeys(map(int, words)))


def surfaces_of(options: Namespace) -> FittedSurfaces | None:
    """The surfaces of the report that the options give."""
    if options.loss_from is None:
        return None
    from megatron_sffn.planning.fitted_loss import read_surfaces

    return read_surfaces(options.loss_from, options.loss_series)


def foreseen_for(
    base: Base, options: Namespace, surfaces: FittedSurfaces | None
) -> Foreseen | None:
    """What is foreseen of the loss of a run, if the options ask for it."""
    if not options.loss:
        return None
    from megatron_sffn.planning.layouts import shape_of
    from megatron_sffn.planning.loss import foresee_loss

    return foresee_loss(shape_of(base), options.tokens, surfaces)


def cases_of(options: Namespace, flags: list[str], gpus: Sequence[int]) -> list[Case]:
    """The best layout for each block size and number of GPUs, and its loss if it is asked for.

    Raises:
        ConfigError: if there is no layout in any case.
    """
    from megatron_sffn.planning.candidates import parse_base
    from megatron_sffn.planning.report import Case
    from megatron_sffn.planning.search import search

    sizes: Sequence[int | None] = numbers_in("--compare-block-sizes", options.compare_block_sizes)
    cases: list[Case] = []
    surfaces = surfaces_of(options)
    for size in sizes or [None]:
        words = [] if size is None else ["--sffn-block-size", str(size)]
        base: Base | None = None
        for count in gpus:
            case = Case(gpus=count, block_size=size)
            try:
                base = base or parse_base([*flags, *words])
                foreseen = foreseen_for(base, options, surfaces)
                case = dataclasses.replace(case, foreseen=foreseen)
                outcome = search(base, cluster_of(options, count), progress=shown)
                cases.append(dataclasses.replace(case, outcome=outcome))
            except ConfigError as error:
                cases.append(dataclasses.replace(case, reason=str(error)))
    if all(case.outcome is None for case in cases):
        raise ConfigError(cases[0].reason)
    return cases


def print_comparison(options: Namespace, flags: list[str]) -> None:
    """The best layouts over numbers of GPUs and block sizes."""
    from megatron_sffn.planning import report
    from megatron_sffn.planning.reasons import why_best

    gpus = numbers_in("--compare-gpus", options.compare_gpus) or [options.gpus]
    cases = cases_of(options, flags, gpus)
    if options.json or options.csv:
        records = [
            report.record(item.best, options.tokens, why_best(item), case.foreseen)
            for case in cases
            if (item := case.outcome) is not None
        ]
        print_records(records, as_json=options.json)
        return
    print(report.cases_table(cases, options.tokens))
    if options.loss:
        from megatron_sffn.planning.loss_text import losses_table

        print("", losses_table(cases), sep="\n")


def print_layouts(options: Namespace, flags: list[str]) -> None:
    """The best layouts on the cluster."""
    from megatron_sffn.planning import report
    from megatron_sffn.planning.candidates import parse_base
    from megatron_sffn.planning.search import search

    cluster, base = cluster_of(options, options.gpus), parse_base(flags)
    foreseen = foreseen_for(base, options, surfaces_of(options))
    outcome = search(base, cluster, top=options.top, progress=shown)
    if options.json or options.csv:
        records = report.records(outcome, options.tokens, options.top, foreseen)
        print_records(records, as_json=options.json)
        return
    ratio = cluster.block_ratio
    given_ratio = (
        "" if ratio is None else f"; blocks take {ratio:g} of a dense layer's time, as given"
    )
    print(
        f"{cluster.gpus:,} × {options.gpu}, {cluster.gpus_per_node} per node; products at "
        f"{cluster.efficiency:.0%} of the peak; all times are derived, none was measured on a GPU"
        f"{given_ratio}\n"
    )
    print(report.layouts_table(outcome, options.tokens, options.top))
    print("", report.winner(outcome.best), sep="\n")
    if foreseen is not None:
        from megatron_sffn.planning.loss_text import loss_lines

        print("", loss_lines(foreseen), sep="\n")


def check_options(options: Namespace) -> None:
    """Refuse numbers that cannot work, before anything is imported."""
    if options.top < 1:
        raise ConfigError(f"--top {options.top} must be at least 1; give a positive number")
    if options.tokens is not None and not 0 < options.tokens < float("inf"):
        raise ConfigError(f"--tokens {options.tokens:g} is not above 0; give for example 300e9")
    if options.loss_series is not None and options.loss_from is None:
        raise ConfigError(
            f"--loss-series {options.loss_series} names a surface of a report; give --loss-from"
        )
    if options.loss_from is not None:
        require("scipy", "--loss-from", "study")
        options.loss = True
    if options.loss and options.tokens is None:
        raise ConfigError("--loss needs the tokens of the training; give --tokens, such as 300e9")
    if options.plot is not None:
        require("matplotlib", "--plot", "plot")
        if options.tokens is None:
            raise ConfigError("--plot needs a budget; give --tokens, for example 300e9")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    options, flags = build_parser().parse_known_args(argv)
    check_options(options)

    from megatron_sffn.patches import prepare

    prepare()  # before Megatron is imported
    if options.check:
        from megatron_sffn.planning.published import published_table

        print(published_table())
        return 0
    if options.compare_gpus is None and options.compare_block_sizes is None:
        print_layouts(options, flags)
    else:
        print_comparison(options, flags)
    if options.plot is not None:
        from megatron_sffn.planning.report import plot

        gpus = numbers_in("--compare-gpus", options.compare_gpus) or PLOTTED_GPUS
        plot(cases_of(options, flags, gpus), options.tokens, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
