"""Patterns of hybrid models that Megatron would misread, or that its modules cannot build.

Inputs: Megatron's namespace before Megatron validates it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.names import flag_of
from megatron_sffn.nn.layer_pattern import hybrid_layers, pipeline_segments, prediction_layers
from megatron_sffn.nn.layer_routers import router_names
from megatron_sffn.nn.routers import ROUTERS

FLAG = "--hybrid-layer-pattern"

UNAVAILABLE = {
    Symbols.MAMBA: "Mamba",
    Symbols.GDN: "a gated delta net",
    Symbols.DS_ATTENTION: "sparse attention",
}
"""Symbol that cannot be used -> what it stands for."""

IGNORED = ("use_rope_scaling", "spec")
"""Flags (dest) that Megatron does not read, or that name another spec, for a hybrid model."""


def pattern(args: Namespace) -> Iterator[Problem]:
    """Patterns that are not Megatron's, or whose layers do not fit the router."""
    text = args.hybrid_layer_pattern
    if text is None:
        return
    for symbol, name in UNAVAILABLE.items():
        if symbol in text:
            rule = f"has {symbol}, {name}, whose parameters and FLOPs would not be counted"
            yield Problem(FLAG, text, rule, "use the layers *, +, - and E")
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


CHECKS = (pattern, flags_beside_pattern, pipeline_cuts)
