"""The layouts of a run on a cluster, by the time of a step.

Inputs: the parsed flags of a run and a `Cluster`. Outputs: a `Plan` for each layout that fits, the
best first, and the number of the others with their reasons.

Design notes: more recomputation is never faster in the model of a step, so a layout is planned with
the least of `RECOMPUTATIONS` with which it fits. Only the memory is computed for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from megatron_sffn.accounting import RankMemory, flops_per_token, memory_per_rank
from megatron_sffn.planning.candidates import Base, Candidate
from megatron_sffn.planning.cluster import MEMORY_RESERVE, Cluster
from megatron_sffn.planning.layouts import Refusals, valid_candidates, workload_of
from megatron_sffn.planning.step_time import StepTime, step_time
from megatron_sffn.planning.traffic import Traffic, step_traffic
from megatron_sffn.planning.workload import Workload
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.human_size import human_size

type Progress = Callable[[list[Candidate]], Iterable[Candidate]]
"""Hands the layouts on, and shows how many are done."""

SECONDS_PER_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout with what it needs and what it reaches.

    Args:
        candidate: sizes of the layout.
        workload: the run in this layout.
        cluster: where it runs.
        memory: of the fullest rank.
        traffic: bytes that a rank sends in a step.
        time: seconds of a step.
    """

    candidate: Candidate
    workload: Workload
    cluster: Cluster
    memory: RankMemory
    traffic: Traffic
    time: StepTime

    @property
    def recompute(self) -> str:
        """Recomputation of activations: `none`, `selective` or `full`."""
        return self.workload.setup.recompute or "none"

    @property
    def fits(self) -> bool:
        """True if the counted memory leaves the reserve free."""
        return self.memory.total <= self.cluster.usable_memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.workload.step_tokens / self.time.total

    @property
    def mfu(self) -> float:
        """FLOPs of the model, without recomputation, over the peak."""
        flops = 3 * flops_per_token(self.workload.shape).total * self.tokens_per_second
        return flops / (self.cluster.gpus * self.cluster.card.peak_flops)

    def days(self, tokens: float) -> float:
        """Days until so many tokens are trained."""
        return tokens / self.tokens_per_second / SECONDS_PER_DAY

    def cost(self, tokens: float) -> float | None:
        """Price of so many tokens; None if the price of a GPU hour is not known."""
        if self.cluster.price is None:
            return None
        return self.days(tokens) * 24 * self.cluster.gpus * self.cluster.price


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All layouts of a run on a cluster.

    Args:
        plans: layouts that fit, the fastest first.
        too_large: layouts that do not fit, however much they recompute, the fastest first.
        refused: flag of a rule -> number of layouts that a run would refuse by it.
    """

    plans: list[Plan]
    too_large: list[Plan]
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def best(self) -> Plan:
        """The fastest layout that fits."""
        return self.plans[0]


def plan_of(base: Base, candidate: Candidate, cluster: Cluster) -> Plan:
    """What one layout needs and reaches, with the recomputation that it names."""
    return _plan(candidate, workload_of(base, candidate, cluster), cluster)


def lightest_plan(base: Base, candidate: Candidate, cluster: Cluster) -> Plan:
    """A layout with the least recomputation with which it fits; else with the least memory."""
    tried: list[tuple[int, Candidate, Workload]] = []
    first = workload_of(base, replace(candidate, recompute=base.recomputations[0]), cluster)
    for name in base.recomputations:
        granularity = first.setup.recompute if name in (None, "none") else name
        workload = replace(first, setup=replace(first.setup, recompute=granularity))
        memory = _memory(workload).total
        tried.append((memory, replace(candidate, recompute=name), workload))
        if memory <= cluster.usable_memory:
            break
    else:
        tried.sort(key=lambda item: item[0], reverse=True)
    return _plan(*tried[-1][1:], cluster)


def _plan(candidate: Candidate, workload: Workload, cluster: Cluster) -> Plan:
    return Plan(
        candidate=candidate,
        workload=workload,
        cluster=cluster,
        memory=_memory(workload),
        traffic=step_traffic(workload, cluster),
        time=step_time(workload, cluster),
    )


def _memory(workload: Workload) -> RankMemory:
    return memory_per_rank(workload.shape, workload.parts, workload.layout, workload.setup)


def search(base: Base, cluster: Cluster, *, top: int = 1, progress: Progress = iter) -> Outcome:
    """All layouts of a run, the fastest first.

    Args:
        base: flags of the run.
        cluster: where it runs.
        top: how many of the fastest layouts are also parsed as a run parses them.
        progress: see `Progress`.

    Raises:
        ConfigError: if no layout is valid, or none fits.
    """
    valid, refusals = valid_candidates(base, cluster.gpus)
    if not valid:
        raise ConfigError(_none_valid(cluster, refusals))
    plans = [lightest_plan(base, candidate, cluster) for candidate in progress(valid)]
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.total))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(_none_fits(plans, cluster))
    confirmed = _confirmed(base, fitting, top, refusals.counts)
    too_large = [plan for plan in plans if not plan.fits]
    return Outcome(plans=confirmed, too_large=too_large, refused=refusals.counts)


def _confirmed(base: Base, plans: list[Plan], top: int, refused: Counter[str]) -> list[Plan]:
    """The plans without those among the first that a run's own parser refuses."""
    accepted: list[Plan] = []
    first_error: ConfigError | None = None
    for index, plan in enumerate(plans):
        if len(accepted) >= top:
            return accepted + plans[index:]
        try:
            flags = [*base.flags, *plan.candidate.flags()]
            parse_as_first_rank(flags, plan.cluster.gpus, device="cuda")
        except ConfigError as error:
            first_error = first_error or error
            refused["other rules"] += 1
        else:
            accepted.append(plan)
    if not accepted and first_error is not None:
        raise first_error
    return accepted


def _none_valid(cluster: Cluster, refusals: Refusals) -> str:
    """The sentence for a run without a valid layout."""
    counts = refusals.counts
    if not counts:
        return (
            f"--gpus {cluster.gpus} are fewer than the ranks of the layout that the flags give; "
            "give more GPUs, or leave the sizes out"
        )
    flag, count = counts.most_common(1)[0]
    if counts.total() == 1:
        return refusals.examples[flag]
    return (
        f"--gpus {cluster.gpus} have no valid layout: {count:,} of {counts.total():,} are refused "
        f"by one rule, for example {refusals.examples[flag]}"
    )


def _none_fits(plans: list[Plan], cluster: Cluster) -> str:
    """The sentence for a run whose layouts are all too large."""
    smallest = min(plans, key=lambda plan: plan.memory.total)
    memory, layout = smallest.memory, smallest.workload.layout
    remedy = "use more GPUs, or cards with more memory"
    recompute_is_given = smallest.candidate.recompute is None
    if recompute_is_given and memory.attention_scores > memory.total / 4:
        remedy += (
            f", or --recompute-granularity selective, since {human_size(memory.attention_scores)} "
            "are attention scores"
        )
    elif recompute_is_given and memory.activations > memory.state:
        remedy += ", or --recompute-granularity full, since activations are the larger part"
    elif not smallest.workload.setup.distributed_optimizer:
        remedy += ", or --use-distributed-optimizer"
    return (
        f"--gpu-memory {cluster.card.memory / 1e9:g} GB is too little for every layout of "
        f"{cluster.gpus} GPUs: the smallest (TP {layout.tp}, PP {layout.pp}, EP {layout.ep}, ETP "
        f"{layout.etp}, recomputation {smallest.recompute}) needs {human_size(memory.total)} "
        f"beside a reserve of {MEMORY_RESERVE:.0%}, and {human_size(cluster.usable_memory)} are "
        f"left; {remedy}"
    )
