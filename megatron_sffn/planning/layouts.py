"""All layouts of a run on a number of GPUs, and why the others are refused.

Inputs: the flags of a run. Outputs: a `Workload` for each layout that a run would accept, and the
number of layouts that each rule refuses.

Design notes
- The flags are parsed once, on one rank. A layout then changes the sizes in a copy of Megatron's
  namespace and goes through the run's own checks (`checks/parallelism.py`) and Megatron's
  config, which takes a millisecond where parsing takes 50. The layouts that are shown are parsed
  in full afterwards (`search.py`).
- A size that a flag gives is kept; the others are powers of two, or divisors of the layers.
- No rule about recomputation depends on the layout, so it is checked once for all layouts.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_sffn.accounting import ModelShape, TrainingSetup, layer_parts
from megatron_sffn.checks import parallelism
from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.flags.sffn_flags import node_size, sffn_config, transformer_config
from megatron_sffn.nn.comm_volume import cheapest_dispatcher
from megatron_sffn.nn.config import Backend
from megatron_sffn.ops import Activation
from megatron_sffn.planning.cluster import Cluster
from megatron_sffn.planning.workload import Workload
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.utils.errors import ConfigError

SIZES = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--num-virtual-stages-per-pipeline-rank": "virtual_stages",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
    "--micro-batch-size": "micro_batch_size",
}
"""Flag of a size -> field of `Candidate`."""

RECOMPUTATIONS: dict[str, dict[str, str | int]] = {
    "none": {},
    "selective": {"--recompute-granularity": "selective"},
    "full": {
        "--recompute-granularity": "full",
        "--recompute-method": "uniform",
        "--recompute-num-layers": 1,
    },
}
"""Recomputation of activations -> its flags: from the fastest to the smallest. `selective` computes
the attention scores again (Megatron's default module), `full` every layer, one by one."""

REFUSED = {
    "--num-layers-per-virtual-pipeline-stage": "use --num-virtual-stages-per-pipeline-rank",
    "--context-parallel-size": "leave it out, context parallelism is not counted",
}
"""Flag that a plan cannot keep -> what to do instead."""

LAYOUT_CHECKS = (parallelism.model_parallelism, parallelism.batch_size)
"""The checks of `parallelism.CHECKS` whose result depends on the layout."""

LARGEST = {"tp": 8, "pp": 64, "virtual_stages": 8, "etp": 8, "micro_batch_size": 16}
"""Largest size that is tried, where no flag gives it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The sizes of one layout, by the flags of `SIZES`.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        virtual_stages: model chunks of a pipeline stage.
        ep: expert-parallel size.
        etp: expert-tensor-parallel size.
        micro_batch_size: sequences of a microbatch.
        recompute: key of `RECOMPUTATIONS`; None for what the flags of the run give.
    """

    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch_size: int = 1
    recompute: str | None = None

    def flags(self) -> list[str]:
        """The sizes and the recomputation as flags of a run."""
        recompute = RECOMPUTATIONS[self.recompute or "none"]
        words = [
            word
            for flag, name in SIZES.items()
            if getattr(self, name) > 1 or name == "micro_batch_size"
            for word in (flag, str(getattr(self, name)))
        ]
        words += ["--sequence-parallel"] if self.tp > 1 else []
        return words + [str(word) for flag in recompute.items() for word in flag]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The flags of a run, parsed on one rank.

    Args:
        flags: of the run, without sizes of the layout.
        args: Megatron's namespace of these flags.
        given: sizes that flags of the run give.
        keeps_dispatcher: True if a flag gives the dispatcher.
        activation: name of the activation function.
        recomputations: keys of `RECOMPUTATIONS` to try; None alone if a flag gives it.
    """

    flags: tuple[str, ...]
    args: Namespace
    given: dict[str, int]
    keeps_dispatcher: bool
    activation: str
    recomputations: tuple[str | None, ...]


def parse_base(flags: Sequence[str]) -> Base:
    """Parse the flags of a run without its layout.

    Args:
        flags: command line of the run.

    Raises:
        ConfigError: if a run would refuse them on one rank, or a plan cannot keep one.
    """
    given: dict[str, int] = {}
    rest: list[str] = []
    words = iter(
        word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])
    )
    for word in words:
        if word in REFUSED:
            raise ConfigError(f"{word} is given, and a plan sets the layout; {REFUSED[word]}")
        if word not in SIZES:
            rest += [] if word == "--sequence-parallel" else [word]
            continue
        value = next(words, "")
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{word} {value} must be at least 1; give a positive number")
        given[SIZES[word]] = int(value)
    args, _ = parse_as_first_rank(rest, 1, device="cuda")
    if "," in args.sffn_router:
        raise ConfigError(
            f"--sffn-router {args.sffn_router} has layers of different times, which a plan does "
            "not add up; plan with each of its routers by itself"
        )
    if args.optimizer == "muon":
        raise ConfigError(
            "--optimizer muon has no foreseen time, since that of Newton-Schulz is not counted; "
            "plan with --optimizer adam"
        )
    if args.global_batch_size == args.micro_batch_size and "--global-batch-size" not in rest:
        raise ConfigError(
            "--global-batch-size is missing, and the time of a step depends on it; give the "
            "sequences of a step, for example 1024"
        )
    return Base(
        flags=tuple(rest),
        args=args,
        given=given,
        keeps_dispatcher="--moe-token-dispatcher-type" in rest,
        activation=Activation.of(transformer_config(args, sffn_config(args))).value,
        recomputations=_recomputations(args),
    )


def _recomputations(args: Namespace) -> tuple[str | None, ...]:
    """The recomputations that Megatron accepts with these flags; None if they give one."""
    if args.recompute_granularity is not None or args.moe_layer_recompute:
        return (None,)
    accepted = []
    for name in RECOMPUTATIONS:
        with contextlib.suppress(ConfigError), warnings.catch_warnings(action="ignore"):
            with as_sentence("accept these flags"):
                transformer_config(_with_recomputation(args, name), sffn_config(args))
            accepted.append(name)
    return tuple(accepted)


def _with_recomputation(args: Namespace, name: str | None) -> Namespace:
    """A copy of Megatron's namespace with a recomputation; None leaves that of the flags."""
    args = copy.copy(args)
    for flag, value in RECOMPUTATIONS[name or "none"].items():
        setattr(args, flag[2:].replace("-", "_"), value)
    return args


def candidates(base: Base, gpus: int) -> Iterator[Candidate]:
    """All sizes whose product fits the number of GPUs, valid or not."""
    layers = base.args.num_layers
    powers = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
    divisors = [size for size in range(1, gpus + 1) if layers % size == 0 or size in powers]
    is_sparse = base.args.sffn_router != "dense"
    choices = {
        "tp": powers,
        "pp": divisors,
        "virtual_stages": [1, 2, 4, 8],
        "ep": powers if is_sparse else [1],
        "etp": powers if is_sparse else [1],
        "micro_batch_size": [1, 2, 4, 8, 16],
    }
    for name, largest in LARGEST.items():
        choices[name] = [size for size in choices[name] if size <= largest]
    choices |= {name: [size] for name, size in base.given.items()}
    for sizes in itertools.product(*choices.values()):
        candidate = Candidate(**dict(zip(choices, sizes, strict=True)))
        fits = candidate.tp * candidate.pp <= gpus
        fits &= candidate.ep * candidate.etp * candidate.pp <= gpus
        # One stage is not cut into chunks.
        if fits and (candidate.pp > 1 or candidate.virtual_stages == 1):
            yield candidate


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
    chunks, stage_layers = candidate.virtual_stages, args.num_layers // candidate.pp
    if stage_layers % chunks:
        return Problem(
            "--num-virtual-stages-per-pipeline-rank",
            chunks,
            f"does not divide the {stage_layers} layers of a stage",
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
    args = _with_recomputation(base.args, candidate.recompute)
    chunks = candidate.virtual_stages if candidate.virtual_stages > 1 else None
    vars(args).update(
        world_size=gpus,
        tensor_model_parallel_size=candidate.tp,
        pipeline_model_parallel_size=candidate.pp,
        num_virtual_stages_per_pipeline_rank=chunks,
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
