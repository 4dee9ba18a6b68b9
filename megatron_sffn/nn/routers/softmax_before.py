"""Softmax before top-K: sigma-MoE's variant with competing scores (arXiv 2310.10837).

The gate is the softmax over all B blocks, of which the K largest compute, as in Switch. Switch's
auxiliary loss is off, and the regularisation of sigma-MoE is available.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig


@dataclass(frozen=True, kw_only=True)
class SoftmaxBeforeConfig(SigmaMoEConfig):
    """Settings of softmax before top-K."""

    name = "softmax-before"
    summary = "sigma-moe with a softmax over all blocks as gate"
    default_gate = "softmax"
    test_numbers = RouterTestNumbers(paper_flags="--sffn-entropy-coeff 1e-3")
