"""Computes the costs of a model before it is built: parameters, FLOPs, memory, traffic.

Inputs: the flags of `megatron_sffn.pretrain`, a number of ranks, and the routers and block sizes to
compare. Outputs: a table, JSON or CSV with a row for each router and block size; a plot.

Design notes: the flags go through the run's own parser, so that the tool counts what would train
and refuses what a run refuses. All numbers are closed forms of `megatron_sffn.accounting`, so that
4,096 ranks take no longer than one. Neither the tokenizer nor the data is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sffn.utils.errors import CommandParser, ConfigError, require, run_command
from megatron_sffn.utils.tool_output import add_form_flags, print_records
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.accounting import ModelShape
    from megatron_sffn.accounting.comparison import Costs, Row
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout

DESCRIPTION = """\
Count what a model costs, without building it: parameters, FLOPs per token, memory of the fullest
rank, and bytes sent per token. It takes the options below and every flag of `python -m
megatron_sffn.pretrain` (see its --help-all). The sizes of the model and --vocab-size (or
--padded-vocab-size) are required, because no tokenizer is read. The default of --micro-batch-size
is 1.
"""

EPILOG = """\
example: one configuration on 64 ranks
  .venv/bin/python tools/accounting.py --ranks 64 --num-layers 24 --hidden-size 1024 \\
      --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 \\
      --vocab-size 50257 --sffn-layers every:6 --expert-model-parallel-size 8 --bf16

example: which block size, which router (add the flags of the model)
  .venv/bin/python tools/accounting.py ... --compare-routers dense,avg-k,switch,vanilla-m \\
      --compare-block-sizes 4096,1024,256,64 --plot costs.png

A row that cannot be trained has dashes, and its reason below the table. docs/accounting.md says
what each number counts.
"""


WITHOUT_EXPERTS = ["--expert-model-parallel-size", "1", "--expert-tensor-parallel-size", "1"]
"""Flags of the dense model in a comparison: it has no blocks to split over ranks."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the tool's own flags."""
    parser = CommandParser(
        prog="tools/accounting.py",
        usage="tools/accounting.py [options] [flags of megatron_sffn.pretrain]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="ranks of the run (default: 1)")
    add(
        "--compare-routers",
        metavar="A,B,...",
        help="a row for each of these --sffn-router values (default: the one that is given)",
    )
    add(
        "--compare-block-sizes",
        metavar="G,H,...",
        help="rows for each of these --sffn-block-size values (default: the one that is given)",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="device of the run: CPU kernels of torch and gloo, or CUDA kernels and nccl (default: "
        "the device of this machine)",
    )
    add_form_flags(parser)
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="also plot FLOPs over dense and memory against the block size",
    )
    return parser


def rows_of(options: Namespace, flags: list[str]) -> tuple[list[Row], str]:
    """All rows, and the lines that say what the rows have in common.

    Args:
        options: parsed options of the tool.
        flags: command line of the run.

    Raises:
        ConfigError: if no row can be trained.
    """
    from megatron_sffn.accounting.comparison import Row
    from megatron_sffn.nn.routers import ROUTERS

    routers = _listed("--compare-routers", options.compare_routers, str)
    sizes = _listed("--compare-block-sizes", options.compare_block_sizes, int)
    unknown = [name for name in routers if name not in ROUTERS]
    if unknown:
        raise ConfigError(
            f"--compare-routers {unknown[0]} is unknown; choose from {', '.join(ROUTERS)}"
        )
    rows, common, first_error = [], "", None
    for router in routers or [None]:
        # The dense model has no blocks.
        for size in (sizes or [None]) if router != "dense" else [None]:
            words = [] if router is None else ["--sffn-router", router]
            words += [] if size is None else ["--sffn-block-size", str(size)]
            words += WITHOUT_EXPERTS if router == "dense" else []
            try:
                row, lines = row_of([*flags, *words], options)
                common = lines if row.router != "dense" or not common else common
            except ConfigError as error:
                first_error = first_error or error
                row = Row(router=router or "given", block_size=size, reason=str(error))
            rows.append(row)
    if first_error is not None and all(row.costs is None for row in rows):
        raise first_error
    return rows, common


def row_of(flags: list[str], options: Namespace) -> tuple[Row, str]:
    """Count one configuration.

    Args:
        flags: command line of the run.
        options: parsed options of the tool.

    Returns:
        The row, and the lines that describe the model, the ranks and the training.

    Raises:
        ConfigError: if the configuration cannot be trained.
    """
    from megatron_sffn.accounting import ModelShape
    from megatron_sffn.accounting.comparison import Row
    from megatron_sffn.flags.sffn_flags import sffn_config
    from megatron_sffn.train.first_rank import parse_as_first_rank

    args, cuda = parse_as_first_rank(flags, options.ranks, device=options.device)
    sffn = sffn_config(args)
    shape = ModelShape.of_args(args, sffn)
    row = Row(
        router=args.sffn_router,
        block_size=None if sffn is None else sffn.block_size,
        costs=costs_of(args, sffn, shape, cuda=cuda),
    )
    return row, described(args, shape, cuda=cuda)


def costs_of(
    args: Namespace, sffn: SparseFFNConfig | None, shape: ModelShape, *, cuda: bool
) -> Costs:
    """All closed forms of one configuration."""
    from megatron_sffn import accounting
    from megatron_sffn.accounting.comparison import Costs
    from megatron_sffn.flags.megatron_flags import layout_of
    from megatron_sffn.flags.sffn_flags import transformer_config
    from megatron_sffn.ops import Activation

    activation, layout = Activation.of(transformer_config(args, sffn)), layout_of(args)
    parameters = accounting.count_parameters(shape)
    recompute = args.recompute_granularity == "full"
    memory = accounting.memory_per_rank(
        shape,
        accounting.layer_parts(
            shape, args.moe_layer_freq if sffn else None, args.hybrid_layer_pattern
        ),
        layout,
        accounting.TrainingSetup.of_args(args, layout, activation=activation.value, cuda=cuda),
    )
    return Costs(
        parameters_total=parameters.total,
        parameters_active=parameters.active,
        flops_forward=accounting.flops_per_token(shape).total,
        flops_training=accounting.training_flops_per_token(shape, recompute=recompute),
        over_dense=accounting.overhead_over_dense(shape),
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        router_tables=memory.router_tables,
        activations=memory.activations,
        attention_scores=memory.attention_scores,
        pipeline_stage=memory.stage,
        microbatches_in_flight=memory.in_flight,
        dispatcher=None if sffn is None else args.moe_token_dispatcher_type,
        sent_per_token_and_layer=None if sffn is None else bytes_sent(shape, layout),
    )


def bytes_sent(shape: ModelShape, layout: ParallelLayout) -> float | None:
    """Bytes sent per token by a sparse layer's forward pass; None if no formula is known."""
    from megatron_sffn.accounting import sent_per_token_and_layer
    from megatron_sffn.nn.comm_volume import DISPATCHERS

    if layout.expert_ranks == 1:
        return 0.0
    return sent_per_token_and_layer(shape, layout) if layout.dispatcher in DISPATCHERS else None


def described(args: Namespace, shape: ModelShape, *, cuda: bool) -> str:
    """The lines above the table: the model, the ranks and the training of all rows."""
    from megatron_sffn.flags.megatron_flags import layout_of

    layout = layout_of(args)
    sizes = [
        f"TP {layout.tp}",
        f"PP {layout.pp}",
        f"EP {layout.ep}",
        f"ETP {layout.etp}",
        f"DP {layout.dp}",
    ]
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    optimizer = "distributed optimizer" if args.use_distributed_optimizer else "whole optimizer"
    recomputed = args.recompute_granularity or "no"
    return "\n".join(
        [
            f"model: {shape.num_layers} layers of width {shape.hidden_size}, "
            f"{shape.sparse_layers} of them sparse, sequences of {shape.seq_length}, "
            f"vocabulary {shape.padded_vocab_size:,}",
            f"ranks: {layout.world_size:,} = {' · '.join(sizes)}; microbatch of "
            f"{args.micro_batch_size}, {dtype}, {optimizer}, {recomputed} recomputation, torch's "
            f"{'CUDA' if cuda else 'CPU'} kernels",
        ]
    )


def _listed(flag: str, text: str | None, kind: type) -> list[Any]:
    """The values of a comma-separated list."""
    words = [] if text is None else [word.strip() for word in text.split(",") if word.strip()]
    try:
        values = [kind(word) for word in words]
    except ValueError:
        values = []
    if text is not None and not values:
        example = "4096,1024,256" if kind is int else "avg-k,switch"
        raise ConfigError(f"{flag} {text} is not a list of values; write for example {example}")
    return list(dict.fromkeys(values))


def record(row: Row) -> dict[str, Any]:
    """A row as one flat record."""
    fields = dataclasses.asdict(row)
    costs = fields.pop("costs") or {}
    return {**fields, **costs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    parser = build_parser()
    options, flags = parser.parse_known_args(argv)
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} must be at least 1; give a positive number")
    if options.plot is not None:
        require("matplotlib", "--plot", "plot")

    from megatron_sffn.patches import prepare

    prepare()  # before Megatron is imported
    from megatron_sffn.accounting.comparison import comparison, plot

    rows, common = rows_of(options, flags)
    records = [record(row) for row in rows]
    if options.json or options.csv:
        print_records(records, as_json=options.json)
    else:
        print(common, comparison(rows), sep="\n\n")
    if options.plot is not None:
        plot(rows, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
