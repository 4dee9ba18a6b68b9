"""The command line: `--sffn-*` flags beside all of Megatron's, their rules, and what follows from them.

Enters: `sys.argv`. Leaves: Megatron's validated namespace, in which the MoE flags are derived from
the S-FFN numbers, and the layer's config. Bad input stops here, before any process group, writer or
file exists.

Choice: a router's flags are the fields of its config (`routers/*.py`), read here; nothing in this
file names a method.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from megatron.training.arguments import parse_args, validate_args

from megatron_sffn.config import Backend, RouterConfig, SparseFFNConfig, moe_fields
from megatron_sffn.errors import ConfigError
from megatron_sffn.model import layer_pattern
from megatron_sffn.routers import ROUTERS

DERIVED = {
    "num_experts": "--num-experts (it is B = E·k/g)",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size (it is --sffn-block-size)",
}
"""Megatron flags (dest -> as named to the user) that follow from the S-FFN numbers."""

USAGE = """torchrun --nproc-per-node N -m megatron_sffn.pretrain [--sffn-* flags] [Megatron flags]
       python -m megatron_sffn.pretrain ...            (one rank)"""


def parse(host_defaults: dict[str, Any]) -> Namespace:
    """Read and validate the command line.

    Args:
        host_defaults: argparse dest -> default that this host needs; a flag on the command line
            still wins.

    Returns:
        Megatron's namespace, validated by Megatron too.

    Raises:
        ConfigError: if a value cannot work.
    """

    def add_flags(parser: ArgumentParser) -> ArgumentParser:
        add_sffn_flags(parser)
        # None: not given, so that the router's own weight can be the default.
        parser.set_defaults(moe_aux_loss_coeff=None, **host_defaults)
        return parser

    args: Namespace = parse_args(add_flags)
    check_layout(args)
    derive_megatron_flags(args, sffn_config(args))
    try:
        validate_args(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Megatron does not accept these flags: {error}") from error
    return args


def add_sffn_flags(parser: ArgumentParser) -> None:
    """Add our flags as the first group of Megatron's parser."""
    group = parser.add_argument_group(
        "sparse feed-forward layers",
        "Of M = E·k memory cells in B = M/g blocks of g cells, each token uses the k cells of the "
        "K = k/g blocks that the router chooses. Balance, placement over ranks and everything else "
        "are Megatron's flags, below.",
    )
    methods = "; ".join(f"{name}: {config.summary}" for name, config in ROUTERS.items())
    add = group.add_argument
    add("--sffn-router", default="avg-k", choices=list(ROUTERS), help=f"selection: {methods}")
    add("--sffn-block-size", type=int, default=256, help="g, cells of a block; 1 is a single cell")
    add("--sffn-expansion", type=int, default=16, help="E, memory cells over active cells")
    add(
        "--sffn-active-cells",
        type=int,
        default=None,
        help="k, active cells of a token, a multiple of g (default: --ffn-hidden-size)",
    )
    add(
        "--sffn-layers",
        default="every:1",
        help="sparse layers: every:N for layers i, from 0, with (i+1) %% N == 0, or 5,11,17,23",
    )
    for option, item in router_flags().items():
        kwargs: dict[str, Any] = {"default": item.default, "help": item.metadata["help"]}
        if isinstance(item.default, bool):
            kwargs["action"] = "store_true"
        else:
            kwargs |= {"type": type(item.default), "choices": item.metadata["choices"]}
        add(option, **kwargs)
    add(
        "--sffn-backend",
        default=Backend.AUTO.value,
        choices=[backend.value for backend in Backend],
        help="who computes the blocks: auto: the fastest here; naive: the oracle, dense with a "
        "mask; cpu: blocks in a loop; megatron: Megatron's own dispatcher and experts",
    )
    add(
        "--sffn-relu",
        action="store_true",
        help="ReLU in every FFN, sparse or dense (Megatron has it, but no flag for it)",
    )
    for action in group._group_actions:
        if action.default not in (None, False):
            action.help = f"{action.help} (default: %(default)s)"
    # argparse prints groups in their order: ours comes first, Megatron's forty after it.
    parser._action_groups.remove(group)
    parser._action_groups.insert(0, group)
    parser.usage = USAGE
    parser.description = "Pretrain a GPT with sparse feed-forward layers on Megatron."
    parser.error = _reject  # type: ignore[method-assign]


def router_flags() -> dict[str, dataclasses.Field[Any]]:
    """Every router's flags: option -> config field; routers may share one."""
    return {
        item.metadata["flag"]: item
        for config in ROUTERS.values()
        for item in dataclasses.fields(config)
    }


def sffn_config(args: Namespace) -> SparseFFNConfig | None:
    """The sparse layer that the flags describe; None for the dense baseline."""
    router_class: type[RouterConfig] = ROUTERS[args.sffn_router]
    router = router_class(
        **{
            item.name: getattr(args, item.metadata["flag"].removeprefix("--").replace("-", "_"))
            for item in dataclasses.fields(router_class)
        }
    )
    active_cells = args.sffn_active_cells or ffn_hidden_size(args)
    if args.sffn_router == "dense":
        if active_cells != ffn_hidden_size(args):
            raise ConfigError(
                f"--sffn-active-cells {active_cells} differs from --ffn-hidden-size "
                f"{ffn_hidden_size(args)}, but --sffn-router dense has Megatron's MLP everywhere; "
                f"set --ffn-hidden-size {active_cells}"
            )
        return None
    return SparseFFNConfig(
        active_cells=active_cells,
        router=router,
        block_size=args.sffn_block_size,
        expansion=args.sffn_expansion,
        backend=Backend(args.sffn_backend),
        seed=args.seed,
    )


def ffn_hidden_size(args: Namespace) -> int:
    """Width of the dense FFN; Megatron's rule where the flag is absent."""
    if args.ffn_hidden_size is not None:
        return int(args.ffn_hidden_size)
    if args.swiglu:
        return int((4 * args.hidden_size * 2 / 3) / 64) * 64
    return 4 * int(args.hidden_size)


def check_layout(args: Namespace) -> None:
    """Rules of the layout that hold for any router.

    Raises:
        ConfigError: if one is broken.
    """
    if args.hidden_size is None or args.num_layers is None:
        missing = "--hidden-size" if args.hidden_size is None else "--num-layers"
        raise ConfigError(f"{missing} is missing; every model needs it, for example {missing} 8")
    if args.context_parallel_size > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine, which "
            "is not installed; install megatron-core[te] or use --context-parallel-size 1"
        )
    if args.num_experts is not None and args.sffn_router == "dense":
        raise ConfigError(
            f"--num-experts {args.num_experts} contradicts --sffn-router dense; for Megatron's own "
            "experts use --sffn-router switch --sffn-backend megatron"
        )


def derive_megatron_flags(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Set Megatron's MoE flags from the S-FFN numbers, and check them against the layout.

    Raises:
        ConfigError: if a derived flag was given, or the layout does not fit the blocks.
    """
    pattern = layer_pattern(args.sffn_layers, args.num_layers)
    balance = args.moe_aux_loss_coeff
    if sffn is None:
        args.moe_aux_loss_coeff = 0.0 if balance is None else balance
        return
    for dest, text in DERIVED.items():
        if getattr(args, dest) is not None:
            raise ConfigError(
                f"{text} is derived from the --sffn flags, but {getattr(args, dest)} was given; "
                "leave it out"
            )
    expert_parallel = args.expert_model_parallel_size
    if sffn.num_blocks % expert_parallel:
        raise ConfigError(
            f"--expert-model-parallel-size {expert_parallel} does not divide the {sffn.num_blocks} "
            f"blocks (--sffn-expansion {sffn.expansion} · --sffn-active-cells {sffn.active_cells} / "
            f"--sffn-block-size {sffn.block_size}); change one of them so that it does"
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ConfigError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} with sparse layers "
            "needs sequence parallelism; add --sequence-parallel"
        )
    if args.expert_tensor_parallel_size not in (None, 1):
        raise ConfigError(
            f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size} would cut blocks "
            "over ranks, which sparse layers do not do; leave it out (blocks stay whole)"
        )
    if args.sffn_router == "rand-hash" and args.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} with --sffn-router "
            "rand-hash is not supported: input ids reach the first stage only; use 1"
        )
    args.num_experts = sffn.num_blocks
    args.moe_router_topk = sffn.num_active_blocks
    args.moe_ffn_hidden_size = sffn.block_size
    args.moe_layer_freq = pattern
    args.moe_router_pre_softmax = moe_fields(sffn)["moe_router_pre_softmax"]
    args.expert_tensor_parallel_size = 1
    derive_balance(args, sffn)


def derive_balance(args: Namespace, sffn: SparseFFNConfig) -> None:
    """Megatron's balance flags, by router.

    Raises:
        ConfigError: if the router takes no balance loss, or not this one.
    """
    given = args.moe_aux_loss_coeff
    if sffn.router.balance_coefficient is None:
        if given or args.moe_z_loss_coeff:
            flag = "--moe-aux-loss-coeff" if given else "--moe-z-loss-coeff"
            raise ConfigError(
                f"{flag} {given or args.moe_z_loss_coeff} has nothing to act on: --sffn-router "
                f"{sffn.router.name} has no learned gate; leave it out, or use --sffn-router switch"
            )
        args.moe_aux_loss_coeff, args.moe_router_load_balancing_type = 0.0, "none"
        return
    kind = args.moe_router_load_balancing_type
    if kind not in ("aux_loss", ["aux_loss"], "none", ["none"]):
        raise ConfigError(
            f"--moe-router-load-balancing-type {kind} is not available with --sffn-router "
            f"{sffn.router.name}; use aux_loss or none"
        )
    if args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"
    if given is None:
        args.moe_aux_loss_coeff = sffn.router.balance_coefficient


def _reject(message: str) -> NoReturn:
    """Argparse's complaint as ours: one sentence, said by one rank."""
    raise ConfigError(f"{message}; --help lists every flag")
