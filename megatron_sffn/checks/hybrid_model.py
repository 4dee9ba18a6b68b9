"""Patterns of hybrid models that Megatron would misread, or that its modules cannot build.

Inputs: Megatron's namespace before Megatron validates it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.gated_delta_net import common

from megatron_sffn.accounting.recurrent import Mamba
from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.names import flag_of
from megatron_sffn.nn.layer_pattern import (
    RECURRENT,
    hybrid_layers,
    pipeline_segments,
    prediction_layers,
)
from megatron_sffn.nn.layer_routers import router_names
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.patches.cpu import is_host

FLAG = "--hybrid-layer-pattern"

IGNORED = ("use_rope_scaling", "spec")
"""Flags (dest) that Megatron does not read, or that name another spec, for a hybrid model."""


def pattern(args: Namespace) -> Iterator[Problem]:
    """Patterns that are not Megatron's, or whose layers do not fit the router."""
    text = args.hybrid_layer_pattern
    if text is None:
        return
    if Symbols.DS_ATTENTION in text:
        rule = "has D, sparse attention, whose parameters and FLOPs would not be counted"
        yield Problem(FLAG, text, rule, "use the layers *, +, M, G, - and E")
    if Symbols.ATTENTION in text and args.multi_latent_attention:
        rule = "has * attention, but --multi-latent-attention or + is given"
        yield Problem(FLAG, text, rule, "write + in place of *")
    try:
        parse_hybrid_pattern(text)
    except ValueError as error:
        rule = f"is none of Megatron's patterns: {str(error).splitlines()[0].rstrip('.')}"
        yield Problem(FLAG, text, rule, "write for example *E*E, with | between pipeline stages")
    is_dense = args.sffn_router == "dense"
    if Symbols.MOE in text if is_dense else Symbols.MOE not in hybrid_layers(text):
        has = "has a sparse layer (E)" if is_dense else "has no sparse layer (E)"
        remedy = "use another" if is_dense else "write an E for each, or use --sffn-router dense"
        yield Problem(FLAG, text, f"{has}, but --sffn-router is {args.sffn_router}", remedy)


def flags_beside_pattern(args: Namespace) -> Iterator[Problem]:
    """Flags that say something else than the pattern, or that a hybrid model does not have."""
    text = args.hybrid_layer_pattern
    if text is not None:
        count = len(hybrid_layers(text))
        if args.num_layers != count:
            rule = f"differs from the {count} layers of {FLAG} {text}"
            yield Problem("--num-layers", args.num_layers, rule, "leave it out")
        if args.sffn_layers != "every:1":
            rule = f"is said by the E of {FLAG} {text} as well"
            yield Problem("--sffn-layers", args.sffn_layers, rule, "leave it out")
        predictions = len(prediction_layers(text))
        if (args.mtp_num_layers or 0) != predictions:
            rule = f"differs from the {predictions} predictions (/) of {FLAG} {text}"
            yield Problem("--mtp-num-layers", args.mtp_num_layers, rule, "leave it out")
    if text is None and args.sffn_model == "gpt":
        return
    # The layers of multi-token prediction have the router of the remaining layers.
    router = ROUTERS[router_names(args.sffn_router)[0]]
    if args.mtp_num_layers and router.needs_token_ids:
        rule = "reads the input ids, which a hybrid model does not pass to multi-token prediction"
        yield Problem("--sffn-router", args.sffn_router, rule, "use --sffn-model gpt")
    for dest in IGNORED:
        if getattr(args, dest):
            rule = "is not available for a hybrid model"
            yield Problem(flag_of(dest), getattr(args, dest), rule, "use --sffn-model gpt")


def pipeline_cuts(args: Namespace) -> Iterator[Problem]:
    """Patterns whose pipeline stages do not fit the number of stages."""
    text, stages = args.hybrid_layer_pattern, args.pipeline_model_parallel_size
    if text is None:
        return
    segments, layers = pipeline_segments(text), len(hybrid_layers(text))
    given = f"--pipeline-model-parallel-size {stages}"
    if segments == 1 and layers % stages:
        rule = f"has {layers} layers, which {given} does not divide"
        yield Problem(FLAG, text, rule, "cut it where the stages begin")
    if segments > 1 and (segments % stages or stages == 1):
        rule = f"has {segments} stages, no multiple of {given} above 1"
        yield Problem(FLAG, text, rule, "leave out |, or cut it into a multiple of the stages")


def recurrent_layers(args: Namespace) -> Iterator[Problem]:
    """Mamba layers and gated delta nets without their packages, or with flags that do not fit."""
    text = args.hybrid_layer_pattern or ""
    yield from _packages(text)
    if Symbols.MAMBA in text:
        yield from _mamba_sizes(args)
    if Symbols.GDN in text:
        yield from _delta_net_sizes(args)
        if not args.swiglu:
            rule = "has G, a gated delta net, which computes with SiLU alone"
            yield Problem(FLAG, text, rule, "add --swiglu")
    recurrent = next((symbol for symbol in text if symbol in RECURRENT), None)
    if recurrent is None:
        return
    rule = f"has {recurrent}, whose state passes over the ends of documents"
    if args.reset_attention_mask:
        yield Problem(FLAG, text, f"{rule}, but --reset-attention-mask is given", "leave one out")
    if "muon" in args.optimizer:
        rule = (
            f"is not available with the {recurrent} of {FLAG} {text}, which has several matrices "
        )
        rule += "in each weight"
        yield Problem("--optimizer", args.optimizer, rule, "use --optimizer adam")


def _packages(text: str) -> Iterator[Problem]:
    """Symbols whose packages cannot be imported; on a CPU most of them are not needed."""
    missing = {
        Symbols.MAMBA: {
            "einops": mamba_mixer.HAVE_EINOPS,
            "mamba-ssm": mamba_mixer.HAVE_MAMBA_SSM,
            "causal-conv1d": is_host() or mamba_mixer.causal_conv1d_fn is not None,
        },
        Symbols.GDN: {"flash-linear-attention": common.HAVE_FLA},
    }
    for symbol, packages in missing.items():
        names = " and ".join(name for name, has in packages.items() if not has)
        if symbol in text and names:
            rule = f"has {symbol}, which needs {names}, and Python cannot import that here"
            remedy = f"pip install {names}" if is_host() else 'pip install "megatron-sffn[mamba]"'
            yield Problem(FLAG, text, rule, remedy)


def _mamba_sizes(args: Namespace) -> Iterator[Problem]:
    """Sizes of Mamba layers that do not divide each other, or that ranks cannot share."""
    head_dim, groups = args.mamba_head_dim, args.mamba_num_groups
    if args.mamba_num_heads is None and 2 * args.hidden_size % head_dim:
        rule = f"does not divide twice --hidden-size {args.hidden_size}"
        yield Problem("--mamba-head-dim", head_dim, rule, "change one, or set --mamba-num-heads")
    tp_size, cp_size = args.tensor_model_parallel_size, args.context_parallel_size
    heads = Mamba(mamba_num_heads=args.mamba_num_heads, mamba_head_dim=head_dim).heads(
        args.hidden_size
    )
    if heads % groups:
        yield Problem("--mamba-num-groups", groups, f"does not divide {heads} heads", "change it")
    yield from _shared_by_ranks("--mamba-num-groups", groups, tp_size)
    yield from _shared_by_ranks("the heads of a Mamba layer,", heads, tp_size * cp_size)
    local_groups = groups // tp_size
    if max(local_groups, cp_size) % min(local_groups, cp_size):
        rule = (
            f"and the {local_groups} groups of a rank (--mamba-num-groups) do not divide the other"
        )
        yield Problem("--context-parallel-size", cp_size, rule, "change one of them")


def _delta_net_sizes(args: Namespace) -> Iterator[Problem]:
    """Sizes of gated delta nets that do not divide each other, or that ranks cannot share."""
    keys, values = args.linear_num_key_heads, args.linear_num_value_heads
    if values % keys:
        rule = f"is not a multiple of --linear-num-key-heads {keys}"
        yield Problem("--linear-num-value-heads", values, rule, "change one of them")
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    yield from _shared_by_ranks("--linear-num-key-heads", keys, ranks)


def _shared_by_ranks(what: str, count: int, ranks: int) -> Iterator[Problem]:
    """A number of heads or groups that the ranks of a replica cannot share equally."""
    if count % ranks:
        rule = f"cannot be shared by {ranks} ranks (--tensor-model-parallel-size and "
        rule += "--context-parallel-size)"
        yield Problem(what, count, rule, f"use a multiple of {ranks}")


CHECKS = (pattern, flags_beside_pattern, pipeline_cuts, recurrent_layers)
