"""`alltoall` on several nodes: a token crosses to each node once, and is handed on within the node.

Straight to each rank, a token would cross the network between nodes once for each rank there that
has a block of it. In two steps it crosses to the rank at its own rank's place in the other node,
with its pairs of all blocks there; that rank is then the sender of an exchange within its node. The
outputs are summed within the node first, so that one row per node comes back.

Each step is the all-to-all with counts of its own: the host waits twice. Sums are rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_sffn.dispatch.all_to_all import send_exactly
from megatron_sffn.dispatch.records import Dispatched, Plan, Tokens
from megatron_sffn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class TwoSteps:
    """The way back.

    Args:
        across: nodes.
        within: the own node.
    """

    across: Plan
    within: Plan

    @property
    def bytes_sent(self) -> int:
        """Of both steps, see `Plan`."""
        return self.across.bytes_sent + self.within.bytes_sent

    def combine(self, y: Tensor) -> Tensor:
        """Sums within the node, and of these across nodes."""
        return self.across.combine(self.within.combine(y))


def once_per_node(tokens: Tokens, placement: Placement) -> Dispatched:
    """Send each row once to each node that has a block of it, then to the node's ranks."""
    across, within = placement.levels()
    first, _ = send_exactly(tokens, across)
    relayed = Tokens(
        rows=first.rows,
        pairs=first.pairs,
        gates=first.gates,
        may_be_empty=False,
        output_bytes=tokens.output_bytes,
        keep=False,
    )
    second, wire = send_exactly(relayed, within)
    again = first.rows_again
    return replace(
        second,
        plan=TwoSteps(across=first.plan, within=second.plan),
        rows_again=None if again is None else lambda: wire.out(again()),
    )
