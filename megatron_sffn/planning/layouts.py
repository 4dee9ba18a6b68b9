"""The layouts of a run that it would accept, and why the others are refused.

Inputs: the flags of a run. Outputs: a `Workload` for each layout that a run would accept, and the
number of layouts that each rule refuses.

Design notes: the flags are parsed once, on one rank. A layout then changes the sizes in a copy of
Megatron's namespace and goes through the run's own checks (`checks/parallelism.py`) and Megatron's
config, which takes a millisecond where parsing takes 50. The layouts that are shown are parsed in
full afterwards (`search.py`).
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace

from megatron_sffn.accounting import ModelShape, TrainingSetup, layer_parts
from megatron_sffn.checks import parallelism
from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.flags.sffn_flags import node_size, sffn_config, transformer_config
from megatron_sffn.nn.comm_volume import cheapest_dispatcher
from megatron_sffn.nn.config import Backend
from megatron_sffn.planning.candidates import (
    Base,
    Candidate,
    candidates,
    cut_pattern,
    divided_layers,
    given_chunks,
    with_recomputation,
)
from megatron_sffn.planning.cluster import Cluster
from megatron_sffn.planning.workload import Workload
from megatron_sffn.utils.errors import ConfigError

LAYOUT_CHECKS = (parallelism.model_parallelism, parallelism.batch_size)
"""The checks of `parallelism.CHECKS` whose result depends on the layout."""


def refusal(base: Base, candidate: Candidate, gpus: int) -> Problem | None:
    """The first rule that refuses a layout; None if a run would accept it."""
    return _own_refusal(base, candidate, gpus) or _megatron_refusal(base, candidate, gpus)


def _own_refusal(base: Base, candidate: Candidate, gpus: int) -> Problem | None:
    """The first of our own checks that refuses a layout."""
    args = namespace_of(base, candidate, gpus)
    sffn = sffn_config(args)
    for check in LAYOUT_CHECKS:
        for problem in check(args):
            return problem
    if sffn is not None:
        for sparse_check in parallelism.SPARSE_CHECKS:
            for problem in sparse_check(args, sffn):
                return problem
    return _chunk_refusal(base, candidate, is_hybrid=args.hybrid_layer_pattern is not None)


def _chunk_refusal(base: Base, candidate: Candidate, *, is_hybrid: bool) -> Problem | None:
    """Why the layers cannot be cut into the chunks of all stages."""
    layers, chunks = divided_layers(base), candidate.virtual_stages
    if is_hybrid and given_chunks(base) is None and layers % (candidate.pp * chunks):
        return Problem(
            "--pipeline-model-parallel-size",
            candidate.pp,
            f"times {chunks} chunks of a stage does not divide the {layers} layers",
            "change one of them so that it does, or cut --hybrid-layer-pattern",
        )
    if not is_hybrid and layers // candidate.pp % chunks:
        return Problem(
            "--num-virtual-stages-per-pipeline-rank",
            chunks,
            f"does not divide the {layers // candidate.pp} layers of a stage",
            "change one of them so that it does",
        )
    return None


def _megatron_refusal(base: Base, candidate: Candidate, gpus: int) -> Problem | None:
    """Why Megatron's config refuses a layout, whatever its microbatch is."""
    args = namespace_of(base, candidate, gpus)
    try:
        with as_sentence("accept these flags"):
            transformer_config(args, sffn_config(args))
    except ConfigError as error:
        return Problem("Megatron's rules", None, f"refuse it: {error}", "")
    return None


def namespace_of(base: Base, candidate: Candidate, gpus: int) -> Namespace:
    """Megatron's namespace with the sizes of a layout, and with what Megatron derives from them."""
    args = with_recomputation(base.args, candidate.recompute)
    chunks = candidate.virtual_stages if candidate.virtual_stages > 1 else None
    pattern = candidate.pattern or args.hybrid_layer_pattern
    if candidate.pattern is None and pattern is not None:
        pattern = cut_pattern(base, pattern, candidate.pp * candidate.virtual_stages)
    vars(args).update(
        world_size=gpus,
        tensor_model_parallel_size=candidate.tp,
        pipeline_model_parallel_size=candidate.pp,
        hybrid_layer_pattern=pattern,
        num_virtual_stages_per_pipeline_rank=chunks if pattern is None else None,
        virtual_pipeline_model_parallel_size=chunks,
        expert_model_parallel_size=candidate.ep,
        expert_tensor_parallel_size=candidate.etp,
        sequence_parallel=candidate.tp > 1,
        micro_batch_size=candidate.micro_batch_size,
        data_parallel_size=gpus // (candidate.tp * candidate.pp),
        tensor_parallel_num_weight_shards=candidate.tp,
        expert_tensor_parallel_num_weight_shards=candidate.etp,
        transformer_pipeline_model_parallel_size=candidate.pp,
        overlap_p2p_comm=candidate.virtual_stages > 1,
    )
    if not base.keeps_dispatcher:
        args.moe_token_dispatcher_type = None
    return args


def shape_of(base: Base) -> ModelShape:
    """The model of the run, which does not depend on the layout."""
    return ModelShape.of_args(base.args, sffn_config(base.args))


def workload_of(base: Base, candidate: Candidate, cluster: Cluster) -> Workload:
    """The run in a layout that the checks accept.

    Raises:
        ConfigError: if its memory has no closed form.
    """
    args = namespace_of(base, candidate, cluster.gpus)
    sffn, layout = sffn_config(args), layout_of(args)
    if sffn is not None:
        sffn = replace(sffn, node_size=node_size(args, cluster.gpus_per_node))
        if not base.keeps_dispatcher and sffn.backend is not Backend.MEGATRON:
            dispatcher = cheapest_dispatcher(sffn, args.hidden_size, layout)
            layout = replace(layout, dispatcher=dispatcher)
    shape = ModelShape.of_args(args, sffn)
    return Workload(
        shape=shape,
        parts=layer_parts(shape, args.moe_layer_freq if sffn else None, args.hybrid_layer_pattern),
        layout=layout,
        setup=TrainingSetup.of_args(args, layout, activation=base.activation, cuda=True),
        overlaps_gradients=args.overlap_grad_reduce,
        overlaps_parameters=args.overlap_param_gather,
    )


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """Layouts that a run would refuse.

    Args:
        counts: flag of a rule -> number of layouts that it refuses first.
        examples: flag of a rule -> its sentence about one of them.
    """

    counts: Counter[str]
    examples: dict[str, str]


def valid_candidates(base: Base, gpus: int) -> tuple[list[Candidate], Refusals]:
    """The layouts that a run would accept, and those that it would refuse."""
    valid: list[Candidate] = []
    refusals = Refusals(counts=Counter(), examples={})
    by_megatron: dict[Candidate, Problem | None] = {}
    for candidate in candidates(base, gpus):
        problem = _own_refusal(base, candidate, gpus)
        if problem is None:
            # Megatron's config takes two milliseconds and does not have the microbatch.
            sizes = replace(candidate, micro_batch_size=1)
            if sizes not in by_megatron:
                by_megatron[sizes] = _megatron_refusal(base, sizes, gpus)
            problem = by_megatron[sizes]
        if problem is None:
            valid.append(candidate)
        else:
            refusals.counts[problem.flag] += 1
            refusals.examples.setdefault(problem.flag, str(problem))
    return valid, refusals
