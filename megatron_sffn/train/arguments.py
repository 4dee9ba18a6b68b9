"""The command line of a run: read, checked, and completed with the flags that follow from it."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from megatron.core.transformer.enums import CudaGraphModule
from megatron.training.arguments import parse_args, validate_args

from megatron_sffn.checks import (
    evaluation,
    flags,
    hybrid_model,
    idle_flags,
    megatron_rules,
    optimizers,
    parallelism,
)
from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.checks.problem import run_checks
from megatron_sffn.flags.megatron_flags import (
    derive_evaluation,
    derive_megatron_flags,
    take_layers_of_pattern,
    unset_flags,
)
from megatron_sffn.flags.sffn_flags import add_sffn_flags, sffn_config, transformer_config
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.train import arguments_file
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
    arguments_file.install()
    moe_defaults: dict[str, Any] = {}
    idle: dict[str, idle_flags.Idle] = {}

    def add_flags(parser: ArgumentParser) -> ArgumentParser:
        moe_defaults.update(unset_flags(parser))
        idle.update(idle_flags.idle_flags(parser))
        parser.set_defaults(**host_defaults)
        add_reshardable_flag(parser)
        add_sffn_flags(parser)
        return parser

    run_checks([flags.yaml_file], sys.argv)
    args = _read(add_flags)
    take_layers_of_pattern(args)
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # Megatron asserts it. CUDA reads the variable when it starts, which is later.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args.sffn_command = sys.argv[1:]  # goes into checkpoints, for tools that replay the run
    run_checks(flags.CHECKS, args)
    run_checks(idle_flags.CHECKS, args, idle)
    run_checks(megatron_rules.CHECKS, args)
    run_checks(hybrid_model.CHECKS, args)
    run_checks(optimizers.CHECKS, args)
    sffn = sffn_config(args)
    run_checks(parallelism.CHECKS, args)
    if sffn is not None:
        run_checks(optimizers.SPARSE_CHECKS, args, sffn)
        run_checks(parallelism.SPARSE_CHECKS, args, sffn)
    run_checks(evaluation.CHECKS, args)
    derive_megatron_flags(args, sffn)
    derive_evaluation(args)
    if find_spec("one_logger") is None:  # else Megatron tells to install NVIDIA's internal package
        args.enable_one_logger = False
    for dest, default in moe_defaults.items():
        if vars(args)[dest] is None:
            setattr(args, dest, default)
    _validate(args, sffn)
    return args


def add_reshardable_flag(parser: ArgumentParser) -> None:
    """Save the optimizer's state in the form that every layout can load, unless a flag says no."""
    dest = "dist_ckpt_optim_fully_reshardable"
    parser.set_defaults(**{dest: True})
    parser.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest=dest,
        action="store_false",
        help="save the distributed optimizer's state without resharding it: faster, but only a run "
        "with the same TP, PP and EP can load it",
    )


def _read(add_flags: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """Parse the command line; an error of Megatron's parser becomes a sentence."""
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
    """Apply Megatron's rules to namespace and config; its errors become sentences."""
    with as_sentence("accept these flags"):
        losses = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
        validate_args(args)
        # Megatron turns a list of one loss into a string and searches it for "aux_loss", so that
        # seq_aux_loss alone would log a load_balancing_loss of 0.
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = losses
        transformer_config(args, sffn)
