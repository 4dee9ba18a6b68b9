"""The command line of a run: read, checked, and completed by what follows from it."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.enums import CudaGraphModule
from megatron.training.arguments import parse_args, validate_args

from megatron_sffn.checks.flags import check_evaluation, check_megatron_flags, check_router_flags
from megatron_sffn.checks.idle_flags import Idle, check_idle_flags, idle_flags
from megatron_sffn.checks.megatron_rules import as_sentence, check_megatron_rules
from megatron_sffn.checks.parallelism import check_layout
from megatron_sffn.flags.megatron_flags import derive_evaluation, derive_megatron_flags, unset_flags
from megatron_sffn.flags.sffn_flags import add_sffn_flags, sffn_config, transformer_config
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.utils.errors import ConfigError


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
    megatron_defaults: dict[str, Any] = {}
    idle: dict[str, Idle] = {}

    def add_flags(parser: ArgumentParser) -> ArgumentParser:
        megatron_defaults.update(unset_flags(parser))
        idle.update(idle_flags(parser))
        parser.set_defaults(**host_defaults)
        # So that every layout can load the optimizer's state, too.
        parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
        parser.add_argument(
            "--no-dist-ckpt-optim-fully-reshardable",
            dest="dist_ckpt_optim_fully_reshardable",
            action="store_false",
            help="save the distributed optimizer's state as it lies: faster, but it can then be "
            "loaded on the same TP, PP and EP only",
        )
        add_sffn_flags(parser)
        return parser

    if any(flag.partition("=")[0] == "--yaml-cfg" for flag in sys.argv):
        raise ConfigError(
            "--yaml-cfg is not available, since Megatron reads its file in place of this command "
            "line; give the flags"
        )
    args = _read(add_flags)
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron insists on it; CUDA reads it when it starts, which it has not yet.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args.sffn_command = sys.argv[1:]  # goes into checkpoints, for tools that replay the run
    check_router_flags(args)
    check_megatron_flags(args, [name for name in megatron_defaults if vars(args)[name] is not None])
    check_idle_flags(args, idle)
    check_megatron_rules(args)
    sffn = sffn_config(args)
    check_layout(args, sffn)
    check_evaluation(args)
    derive_megatron_flags(args, sffn)
    derive_evaluation(args)
    for name, default in megatron_defaults.items():
        if vars(args)[name] is None:
            setattr(args, name, default)
    _validate(args, sffn)
    return args


def _read(add_flags: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """The command line by Megatron's parser, with its complaints as ours."""
    try:
        with as_sentence("accept these flags"):
            args: Namespace = parse_args(add_flags)
    except KeyError as error:
        known = ", ".join(CudaGraphModule.__members__)
        raise ConfigError(
            f"--cuda-graph-modules {error.args[0]} is no part of a layer; choose of {known}"
        ) from error
    return args


def _validate(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Megatron's rules for namespace and config, with its complaint as ours."""
    with as_sentence("accept these flags"):
        balance = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
        validate_args(args)
        # Megatron makes a string of a list of one, and looks for "aux_loss" in it: seq_aux_loss
        # alone would log a load_balancing_loss of 0.
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = balance
        transformer_config(args, sffn)
