"""Optimizers that cannot train every weight, and what Megatron's Muon cannot do.

Inputs: Megatron's namespace before Megatron validates it.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.names import flag_of
from megatron_sffn.flags.param_groups import factors_of
from megatron_sffn.nn.config import SparseFFNConfig

SPARSE_OPTIMIZERS = ("adam", "sgd", "lion", "muon", "dist_muon")
"""Optimizers that train tables of blocks `[B, G, D]`: number by number, or block by block."""


def optimizer(args: Namespace) -> Iterator[Problem]:
    """Optimizers that cannot train every weight, or whose package is not installed."""
    for dest in ("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2", "muon_momentum"):
        beta = getattr(args, dest)
        if not 0 <= beta < 1:
            rule = "must be at least 0 and less than 1"
            yield Problem(flag_of(dest), beta, rule, "give a usual one")
    name = args.optimizer
    if name == "adaptive_muon":
        yield Problem(
            "--optimizer",
            name,
            "is not available: Megatron 0.19 does not set the scale that emerging-optimizers 0.3 "
            "reads in its first step",
            "use --optimizer muon",
        )
    if args.sffn_router != "dense" and name not in SPARSE_OPTIMIZERS:
        yield Problem(
            "--optimizer",
            name,
            "is not available with sparse layers: Megatron would use it for two-dimensional "
            "weights, and Adam for the tables of blocks, which are most of the model",
            "use --optimizer muon or adam",
        )
    if name not in ("adam", "sgd") and importlib.util.find_spec("emerging_optimizers") is None:
        yield Problem(
            "--optimizer",
            name,
            "needs the package emerging-optimizers, which is not installed",
            'pip install "megatron-sffn[muon]", or use --optimizer adam',
        )
    if name == "sgd" and args.use_distributed_optimizer:
        yield Problem(
            "--optimizer",
            "sgd",
            "is not available with --use-distributed-optimizer, which shards the state of Adam",
            "leave one out",
        )


def muon(args: Namespace) -> Iterator[Problem]:
    """Precisions, layouts and settings that Muon, Lion and SOAP of Megatron do not have."""
    name = args.optimizer
    if name in ("adam", "sgd"):
        return
    if args.fp16:
        yield Problem(
            "--optimizer", name, "is not available with --fp16", "use --bf16, or --optimizer adam"
        )
    if (args.use_distributed_optimizer or name == "dist_muon") and not args.bf16:
        yield Problem(
            "--optimizer",
            name,
            "with --use-distributed-optimizer hands whole weights to ranks, for which Megatron "
            "0.19 needs --bf16",
            f"add that, or use --optimizer {name.removeprefix('dist_')} without "
            "--use-distributed-optimizer",
        )
    if args.overlap_param_gather and args.distributed_backend == "gloo":
        yield Problem(
            "--overlap-param-gather",
            None,
            f"gathers parts of unequal size with --optimizer {name}, which gloo cannot",
            "leave it out",
        )
    if args.muon_num_ns_steps < 1:
        yield Problem(
            "--muon-num-ns-steps",
            args.muon_num_ns_steps,
            "leaves the momentum as it is",
            "use at least 1",
        )
    if args.muon_fp32_matmul_prec == "low":
        yield Problem(
            "--muon-fp32-matmul-prec",
            "low",
            "is a name that torch does not know",
            "use medium (bf16) or high",
        )
    kinds = _coefficient_types()
    if args.muon_coefficient_type not in kinds:
        yield Problem(
            "--muon-coefficient-type",
            args.muon_coefficient_type,
            "is unknown to the installed emerging-optimizers",
            f"choose of {', '.join(kinds)}",
        )


def _coefficient_types() -> tuple[str, ...]:
    """The coefficient types of Newton-Schulz that need no further arguments."""
    from megatron.core.optimizer.emerging_optimizers import get_supported_coefficient_types

    return tuple(kind for kind in get_supported_coefficient_types() if kind != "custom")


def factors(args: Namespace) -> Iterator[Problem]:
    """Factors of keys, values and gates that cannot be read, or that have nothing to act on."""
    for dest in ("sffn_lr_mult", "sffn_wd_mult"):
        flag, text = flag_of(dest), getattr(args, dest)
        try:
            factors_of(text)
        except ValueError as error:
            remedy = f"give factors such as {flag} values:2,gates:0.5"
            yield Problem(flag, text, str(error), remedy)
        if text is not None and args.sffn_router == "dense":
            rule = "has nothing to act on: --sffn-router dense has no sparse layers"
            yield Problem(flag, text, rule, "leave it out")
    decays = (args.weight_decay, args.start_weight_decay, args.end_weight_decay)
    if args.sffn_wd_mult is not None and not any(decays):
        yield Problem(
            "--sffn-wd-mult",
            args.sffn_wd_mult,
            "has nothing to act on: --weight-decay is 0",
            "leave it out, or give a weight decay",
        )


CHECKS = (optimizer, muon, factors)


def groups(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Factors of groups of weights that no sparse layer has."""
    layers = [sffn.with_router(router) for router in sffn.routers]
    absent = {}
    if not any(layer.key_width(args.hidden_size) for layer in layers):
        absent["keys"] = "its cells have values alone; its own keys are gates"
    if not any(_router_weights(layer, args.hidden_size) for layer in layers):
        absent["gates"] = "it has no weights of its own"
    for dest in ("sffn_lr_mult", "sffn_wd_mult"):
        text = getattr(args, dest)
        for group in factors_of(text):
            if reason := absent.get(group):
                rule = f"names {group}, and --sffn-router {args.sffn_router} has none: {reason}"
                yield Problem(flag_of(dest), text, rule, f"leave {group} out")


def _router_weights(layer: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The weights of a layer's router: name -> shape."""
    return layer.router.weights(layer, layer.router_width(hidden_size))


SPARSE_CHECKS = (groups,)
"""Checks of models that have sparse layers."""


def learning_rate(args: Namespace) -> Iterator[Problem]:
    """A training without a learning rate."""
    if args.lr is None and not args.skip_train:
        yield Problem("--lr", None, "is missing", "give a learning rate, for example --lr 1e-3")


TRAINING_CHECKS = (learning_rate,)
"""Checks of a run, which tools that only read its flags do not need."""


def remark(args: Namespace, sffn: SparseFFNConfig | None) -> str | None:
    """What Muon does with tables that are no matrices, to be said before the first step."""
    if args.optimizer != "muon" or sffn is None or sffn.block_size > 1:
        return None
    if not sffn.router.key_width(args.hidden_size):
        return (
            f"--optimizer muon leaves the values of {sffn.router.name} to "
            f"{args.muon_scalar_optimizer}: without keys they are rows of their own, as those of "
            "an embedding"
        )
    return (
        "--optimizer muon moves each key and value of --sffn-block-size 1 by its normalised "
        "momentum, since a block of one cell is a matrix of one row"
    )
