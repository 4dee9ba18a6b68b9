"""The `--sffn-*` flags, and the configs that the command line describes.

Inputs: Megatron's parser, later its namespace. Outputs: the config of the sparse layer, and
Megatron's transformer config with the sparse layer in it.

Design notes: a router's flags are the fields of its config (`nn/routers/*.py`), so that this file
names no router.
"""

from __future__ import annotations

import dataclasses
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_sffn.flags.flag_help import help_in_two_steps
from megatron_sffn.flags.names import dest_of
from megatron_sffn.flags.param_groups import GROUPS
from megatron_sffn.nn.config import (
    INITIALIZATIONS,
    REGATHER,
    Backend,
    RouterConfig,
    SparseFFNConfig,
)
from megatron_sffn.nn.layer_pattern import layer_pattern
from megatron_sffn.nn.layer_routers import canonical, other_routers, router_names
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import (
    SparseFFNMLATransformerConfig,
    SparseFFNTransformerConfig,
)

USAGE = """torchrun --nproc-per-node N -m megatron_sffn.pretrain [--sffn-* flags] [Megatron flags]
       python -m megatron_sffn.pretrain ...            (one rank)"""


def add_sffn_flags(parser: ArgumentParser) -> None:
    """Add our flags as the first group of Megatron's parser."""
    group = parser.add_argument_group(
        "sparse feed-forward layers",
        "A layer has M = E·k memory cells in B = M/g blocks of g cells. The router chooses K = k/g "
        "blocks for each token, which uses their k cells. Load balancing "
        "(--moe-router-load-balancing-type, --moe-aux-loss-coeff, --moe-z-loss-coeff, "
        "--moe-router-enable-expert-bias, --moe-router-quantile-balancing-ema), parallelism and "
        "everything else have Megatron's flags (--help-all).",
    )
    _add_model_flags(group.add_argument)
    _add_router_flags(group.add_argument)
    _add_compute_flags(group.add_argument)
    _add_optimizer_flags(group.add_argument)
    _add_run_flags(group.add_argument)
    for action in group._group_actions:
        if action.default is not None and action.default is not False:
            action.help = f"{action.help} (default: %(default)s)"
    for action in parser._actions:
        # Megatron 0.19 has a bare percent sign in a help text, which would make --help fail.
        action.help = re.sub(r"%%|%(?!\()", "%%", action.help or "")
    # argparse prints groups in their order: our group first, Megatron's forty groups after it.
    parser._action_groups.remove(group)
    parser._action_groups.insert(0, group)
    parser.usage = USAGE
    parser.description = "Pretrain a GPT with sparse feed-forward layers on Megatron."
    help_in_two_steps(parser, group)


def _add_model_flags(add: Callable[..., Any]) -> None:
    """Flags of the model: its router, its blocks, and where its sparse layers are."""
    methods = "; ".join(f"{name}: {config.summary}" for name, config in ROUTERS.items())
    add(
        "--sffn-router",
        default="avg-k",
        type=router_value,
        metavar="ROUTER",
        help="how a token chooses blocks: one router, or several with their sparse layers, such as "
        "rand-hash:first:3,avg-k: a part NAME:LAYERS has the layers of one of the forms of "
        "--sffn-layers, here counted over the sparse layers alone, and the last NAME has all "
        f"others; {methods}",
    )
    blocks = "g, cells of a block; 1 for single cells"
    add("--sffn-block-size", type=int, metavar="g", default=256, help=blocks)
    memory = "E, memory cells over active cells"
    add("--sffn-expansion", type=int, metavar="E", default=16, help=memory)
    add(
        "--sffn-active-cells",
        type=int,
        metavar="k",
        help="k, active cells of a token; a multiple of g (default: --ffn-hidden-size)",
    )
    add(
        "--sffn-layers",
        metavar="LAYERS",
        default="every:1",
        help="which layers are sparse, counted from 0: every:N for layers i with (i+1) %% N == 0, "
        "every:N:I for I, I+N, I+2N, ...; first:N or last:N; or a list such as 5,11,17,23",
    )
    add(
        "--sffn-model",
        choices=("gpt", "hybrid"),
        default="gpt",
        help="which model of Megatron's has the layers: gpt: GPTModel; hybrid: HybridModel, with "
        "the same layers as --hybrid-layer-pattern, such as *-*E, and the same initial weights; "
        "with that flag the model is hybrid anyway, and --num-layers and --sffn-layers follow",
    )
    add(
        "--sffn-shared-blocks",
        type=int,
        metavar="S",
        default=0,
        help="S, how many of the k/g active blocks are shared, the same for every token: their "
        "cells come in addition to the M, and are computed on the token's own rank; the router "
        "chooses the other K = k/g - S (not in the papers)",
    )
    add(
        "--sffn-layers-per-table",
        type=int,
        metavar="N",
        default=1,
        help="N, how many consecutive sparse layers have one table of keys and values, each with a "
        "router of its own: the number of sparse layers for one table in the whole model, as in "
        "Memory+; layers with one table must be on one pipeline stage",
    )
    tables = "; ".join(f"{name}: {how}" for name, how in INITIALIZATIONS.items())
    add(
        "--sffn-init",
        choices=list(INITIALIZATIONS),
        help=f"how keys and values are initialised: {tables} (default: as the router's paper)",
    )
    add(
        "--sffn-relu",
        action="store_true",
        help="ReLU in every FFN, sparse or dense (Megatron supports it, but has no flag for it)",
    )


def _add_router_flags(add: Callable[..., Any]) -> None:
    """Flags of the routers, from the fields of their configs."""
    for option, item in router_flags().items():
        kwargs: dict[str, Any] = {"default": item.default, "help": item.metadata["help"]}
        if item.metadata["kind"] is bool:
            kwargs["action"] = "store_true"
        else:
            kwargs |= {"type": item.metadata["kind"], "choices": item.metadata["choices"]}
        add(option, **kwargs)


def _add_compute_flags(add: Callable[..., Any]) -> None:
    """Flags that leave the model as it is: how the blocks are computed and tokens exchanged."""
    add(
        "--sffn-backend",
        default=Backend.AUTO.value,
        choices=[backend.value for backend in Backend],
        help="who computes the blocks: auto: the fastest for these sizes on this machine; naive: "
        "the reference, dense with a mask; torch: a loop over blocks; grouped: torch's grouped "
        "GEMM, for blocks of a multiple of 8 cells in bf16; masked: dense GEMMs over all cells, "
        "followed by a mask; bags: sums of single cells; quack: the grouped GEMM of the package "
        "quack-kernels; cpu: C++ kernels, compiled on this machine; triton: kernels for a GPU; "
        "megatron: Megatron's own dispatcher and experts",
    )
    when = "; ".join(f"{name}: {rule}" for name, rule in REGATHER.items())
    add(
        "--sffn-regather",
        choices=list(REGATHER),
        default="auto",
        help="send the tokens between expert ranks again in the backward pass, rather than keep "
        "all rows that a rank received: less memory for one more exchange of rows per layer, with "
        f"the same results; {when}",
    )
    add(
        "--sffn-node-size",
        type=int,
        metavar="N",
        help="with --moe-token-dispatcher-type alltoall: send a token once to each node of N ranks "
        "that holds a block that it chose, and pass it on within the node, so that the slow "
        "network between nodes carries it once; 0: send it to each rank directly (default: ranks "
        "of a node, if the expert ranks fill several whole nodes, else 0)",
    )
    add(
        "--sffn-exchange-chunks",
        type=int,
        metavar="N",
        default=1,
        help="with --moe-token-dispatcher-type alltoall: cut a rank's tokens of a microbatch into "
        "N chunks, and exchange each chunk while the blocks compute the previous one; smaller "
        "chunks make smaller GEMMs, so use 2 to 4 at most",
    )


def _add_optimizer_flags(add: Callable[..., Any]) -> None:
    """Flags of how keys, values and gates are trained."""
    groups = "; ".join(f"{group}: {weights}" for group, weights in GROUPS.items())
    add(
        "--sffn-lr-mult",
        metavar="GROUP:FACTOR,...",
        help="factors of the learning rate (--lr and --min-lr) for groups of weights, such as "
        f"values:4,gates:0.5; {groups}; a group that is not named has 1, and 0 freezes one",
    )
    add(
        "--sffn-wd-mult",
        metavar="GROUP:FACTOR,...",
        help="factors of --weight-decay for the same groups, such as values:0 for none, as is "
        "usual for tables of which a step reads few rows",
    )


def _add_run_flags(add: Callable[..., Any]) -> None:
    """Flags of data, evaluation, checkpoints and output."""
    add(
        "--sffn-verbose",
        action="store_true",
        help="print all that Megatron prints; without it the list of all arguments goes to "
        "arguments.txt in the run's folder alone, and on a terminal one line shows the progress "
        "while Megatron's lines go to train.log there",
    )
    add(
        "--sffn-trust-checkpoint",
        action="store_true",
        help="load a checkpoint that names code other than torch's and Megatron's classes, as old "
        "checkpoints do, and let that code run",
    )
    add(
        "--sffn-record-routing",
        metavar="FILE",
        help="with --skip-train on one rank: write the blocks of every validation token to FILE "
        "(.npz), for tools/analyze_routing.py",
    )
    add(
        "--sffn-dataloader",
        default="torch",
        choices=("torch", "dali"),
        help="who makes batches: torch: Megatron's loader; dali: the same batches in the same "
        "order through NVIDIA DALI (the extra dali), on the GPU if there is one; --num-workers is "
        "then the number of threads that read ahead",
    )
    add(
        "--sffn-validation-data",
        default="first",
        choices=("first", "next"),
        help="what an evaluation reads: first: the first --eval-iters batches of the validation "
        "set every time, so that losses of steps, runs and checkpoints can be compared; next: the "
        "batches after those of the last evaluation, as Megatron does (--full-validation: all)",
    )


def router_value(text: str) -> str:
    """Read `--sffn-router`, whose layers are checked when the number of layers is known.

    Raises:
        ArgumentTypeError: if a router is unknown.
    """
    text = canonical(text)
    names = router_names(text)
    unknown = [name for name in names if name not in ROUTERS]
    if unknown:
        raise ArgumentTypeError(f"{unknown[0]!r} is unknown; choose from {', '.join(ROUTERS)}")
    if "dense" in names and text != "dense":
        raise ArgumentTypeError(
            f"{text} has dense layers among its routers; say with --sffn-layers which are sparse"
        )
    return text


def router_flags() -> dict[str, dataclasses.Field[Any]]:
    """Flags of all routers -> the config field; several routers may have the same flag."""
    return {
        item.metadata["flag"]: item
        for config in ROUTERS.values()
        for item in dataclasses.fields(config)
    }


def sffn_config(args: Namespace) -> SparseFFNConfig | None:
    """The sparse layer that the flags describe; None for the dense baseline."""
    if args.sffn_router == "dense":
        return None
    num_sparse = 1
    if "," in args.sffn_router:
        hybrid = vars(args).get("hybrid_layer_pattern")
        num_sparse = sum(layer_pattern(args.sffn_layers, args.num_layers, hybrid))
    others = other_routers(args.sffn_router, num_sparse)
    configs = {name: _router_config(args, name) for name in router_names(args.sffn_router)}
    router, *_ = configs.values()
    active_cells = args.sffn_active_cells
    return SparseFFNConfig(
        active_cells=ffn_hidden_size(args) if active_cells is None else active_cells,
        router=router,
        block_size=args.sffn_block_size,
        expansion=args.sffn_expansion,
        shared_blocks=args.sffn_shared_blocks,
        backend=args.sffn_backend,
        initialization=args.sffn_init,
        seed=args.seed,
        regather=args.sffn_regather,
        node_size=node_size(args),
        exchange_chunks=args.sffn_exchange_chunks,
        latent_size=vars(args).get("moe_latent_size"),
        other_routers=tuple((index, configs[name]) for index, name in others.items()),
        layers_per_table=args.sffn_layers_per_table,
    )


def _router_config(args: Namespace, name: str) -> RouterConfig:
    """The config of a router, from its flags."""
    router_class: type[RouterConfig] = ROUTERS[name]
    fields = {
        item.name: getattr(args, dest_of(item.metadata["flag"]))
        for item in dataclasses.fields(router_class)
    }
    return router_class(**fields)


def node_size(args: Namespace, local_ranks: int | None = None) -> int:
    """Ranks of a node if tokens travel in two steps; 0 if they go to each rank directly.

    Without `--sffn-node-size` it is the ranks of a node, if the ranks that hold the blocks fill
    several whole nodes.

    Args:
        args: Megatron's namespace.
        local_ranks: ranks of a node; None for torchrun's LOCAL_WORLD_SIZE.
    """
    if args.sffn_node_size is not None:
        return int(args.sffn_node_size)
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if local_ranks is None else local_ranks
    etp_size = args.expert_tensor_parallel_size or 1
    expert_ranks = args.expert_model_parallel_size * etp_size
    has_whole_nodes = size > 1 and expert_ranks % size == 0 and size % etp_size == 0
    return size if has_whole_nodes and expert_ranks > size else 0


def ffn_hidden_size(args: Namespace) -> int:
    """Width of the dense FFN; without the flag by Megatron's rule."""
    if args.ffn_hidden_size is not None:
        return int(args.ffn_hidden_size)
    if args.swiglu:
        return int((4 * args.hidden_size * 2 / 3) / 64) * 64
    return 4 * int(args.hidden_size)


def transformer_config(args: Namespace, sffn: SparseFFNConfig | None) -> SparseFFNTransformerConfig:
    """Megatron's config with the sparse layer in it.

    Args:
        args: validated.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        AssertionError, ValueError: Megatron's, if it does not accept the numbers.
    """
    pattern = args.hybrid_layer_pattern
    described = Namespace(**{**vars(args), "sffn": sffn, "hybrid_pattern": pattern})
    config_class = SparseFFNTransformerConfig
    if args.multi_latent_attention:
        config_class = SparseFFNMLATransformerConfig
        described.multi_latent_attention = False  # Megatron would take its own config class
    if args.sffn_relu:
        described.activation_func = F.relu
    if args.sffn_relu or args.squared_relu or args.quick_geglu:
        described.bias_gelu_fusion = False  # Megatron would refuse to fuse another activation
    if args.activation_func_clamp_value is not None or args.glu_linear_offset:
        described.bias_swiglu_fusion = False  # the fusion ignores the clamp, and has no offset
    config: SparseFFNTransformerConfig = core_transformer_config_from_args(described, config_class)
    return config


def saved_config(saved: Namespace) -> SparseFFNConfig | None:
    """The sparse layer of a checkpoint.

    Args:
        saved: its arguments. A flag that is newer than the checkpoint has its default.
    """
    defaults = {dest_of(flag): item.default for flag, item in router_flags().items()}
    defaults |= {
        "sffn_shared_blocks": 0,
        "sffn_init": None,
        "sffn_regather": "auto",
        "sffn_node_size": 0,
        "sffn_exchange_chunks": 1,
        "sffn_layers_per_table": 1,
    }
    return sffn_config(Namespace(**{**defaults, **vars(saved)}))
