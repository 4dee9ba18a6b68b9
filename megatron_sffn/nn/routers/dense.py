"""Dense: no selection. The layers of `--sffn-layers` keep Megatron's own MLP of k cells.

Dense is the baseline of every comparison: equal active compute, and no further cells. Block size
and expansion do not apply.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.nn.config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class DenseConfig(RouterConfig):
    """Settings of the dense baseline: none."""

    name = "dense"
    summary = "Megatron's own MLP with k cells, the baseline of equal compute"
