"""Dense: no selection. The chosen layers keep Megatron's own MLP of k cells.

It is the baseline of every comparison: equal active compute, no memory beyond it. Block size and
expansion do not apply.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.nn.config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class DenseConfig(RouterConfig):
    """Settings of the dense baseline: none."""

    name = "dense"
    summary = "Megatron's own MLP with k cells, the baseline of equal compute"
