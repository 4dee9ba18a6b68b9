"""Softmax after top-K: sigma-MoE's variant with renormalised scores (arXiv 2310.10837).

The gate is the softmax over the K chosen blocks, so that the gates of a token sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig


@dataclass(frozen=True, kw_only=True)
class SoftmaxAfterConfig(SigmaMoEConfig):
    """Settings of softmax after top-K."""

    name = "softmax-after"
    summary = "sigma-moe with a softmax over the chosen blocks as gate"
    default_gate = "softmax-chosen"
    test_numbers = RouterTestNumbers(paper_flags="--sffn-entropy-coeff 1e-3")
