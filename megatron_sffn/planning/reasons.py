"""Why a layout is faster or slower than another, in one line.

Inputs: two plans. Outputs: a clause for the table.
"""

from __future__ import annotations

from megatron_sffn.planning.search import Outcome, Plan
from megatron_sffn.utils.human_size import human_size

TWICE = {"selective": "computes attention scores", "full": "runs every layer forward"}
"""Recomputation -> what it does a second time."""


def why_best(outcome: Outcome) -> str:
    """Why the first layout is the first: what it computes, and what else takes the most time."""
    best = outcome.best
    waiting = {name: share for name, share in _shares(best).items() if name != "computing"}
    name = max(waiting, key=lambda key: waiting[key])
    line = f"fastest of {len(outcome.plans):,} that fit: {_shares(best)['computing']:.0%} computing"
    if waiting[name] < 0.005:
        return line
    line += f", {name} {waiting[name]:.0%}"
    overlaps = best.workload.overlaps_gradients and best.workload.overlaps_parameters
    if name == "gradients and parameters of replicas" and not overlaps:
        line += " (--overlap-grad-reduce --overlap-param-gather hide them)"
    return line


def why_not(plan: Plan, best: Plan) -> str:
    """Why a layout is not the best: it does not fit, or what takes it longer."""
    if not plan.fits:
        usable = human_size(plan.cluster.usable_memory)
        return f"does not fit: {human_size(plan.memory.total)} of {usable}"
    mine, theirs = _seconds(plan), _seconds(best)
    name = max(mine, key=lambda key: mine[key] - theirs[key])
    excess = mine[name] - theirs[name]
    if excess < 0.001 * best.time.total:
        return "as fast"
    if name == "computing":
        line = f"computes {mine[name] / theirs[name] - 1:.1%} longer"
    else:
        line = f"{name} {mine[name] / plan.time.total:.1%}"
    return line + _where(name, plan, best)


def _where(name: str, plan: Plan, best: Plan) -> str:
    """What of the layout makes a part long, if it can be named."""
    layout, cluster = plan.workload.layout, plan.cluster
    if name == "dispatch and combine" and plan.traffic.expert_network:
        return ", dispatch leaves the node"
    if name == "tensor-parallel collectives" and cluster.leaves_node(layout.tp):
        return ", they leave the node"
    if name == "computing" and plan.recompute != best.recompute and plan.recompute in TWICE:
        return f", {TWICE[plan.recompute]} twice"
    if name == "computing" and plan.time.block_ratio is not None:
        return f", blocks at {plan.time.block_ratio:.2f} of dense"
    return ""


def _seconds(plan: Plan) -> dict[str, float]:
    """The parts of a step by the names of the table."""
    time = plan.time
    return {
        "computing": time.compute,
        "tensor-parallel collectives": time.tensor,
        "dispatch and combine": time.expert,
        "transfers between stages": time.pipeline,
        "gradients and parameters of replicas": time.data,
        "pipeline bubble": time.bubble,
    }


def _shares(plan: Plan) -> dict[str, float]:
    """The parts of a step over the whole."""
    return {name: seconds / plan.time.total for name, seconds in _seconds(plan).items()}
