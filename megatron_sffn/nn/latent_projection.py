"""The projections around the blocks of a latent layer (`--moe-latent-size`).

Inputs: tokens `[T, D]`, or the blocks' sums `[T, L]`. Outputs: rows `[T, L]` for the blocks, or the
update `[T, D]`.

Design notes: they are Megatron's `fc1_latent_proj` and `fc2_latent_proj`, with its names in a
checkpoint and its initial distributions. Megatron builds them of Transformer Engine's linear
layers, which need a GPU. They have no biases, like everything in a sparse layer.
"""

from __future__ import annotations

from typing import override

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter

from megatron_sffn.nn.init import init_dtype, latent_init
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import device
from megatron_sffn.utils.hashing import seed_of


class LatentProjection(torch.nn.Module):
    """A linear map between D and L numbers, which every rank holds as a whole.

    Args:
        config: config of the model, whose sparse layers are latent.
        direction: `down` to L numbers, or `up` to D.
    """

    def __init__(self, config: SparseFFNTransformerConfig, direction: str) -> None:
        super().__init__()
        assert config.sffn is not None and config.sffn.latent_size is not None, "not latent"
        self.config, self.direction = config, direction
        shape = config.sffn.latent_size, config.hidden_size
        self.weight = Parameter(
            torch.empty(
                shape if direction == "down" else shape[::-1],
                dtype=config.params_dtype,
                device=device.current(),
            )
        )
        # Under sequence parallelism TP ranks have different tokens: Megatron sums their gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @torch.no_grad()
    def init_weight(self, layer_number: int) -> None:
        """Draw the weight of this layer on the CPU, the same on every rank and device."""
        config = self.config
        if not config.perform_initialization:
            return
        assert config.sffn is not None, "latent projections need config.sffn"
        with torch.random.fork_rng(devices=[]):
            seed = seed_of(config.sffn.seed, layer_number, "latent", self.direction)
            torch.default_generator.manual_seed(seed)
            initial = torch.empty(self.weight.shape, dtype=init_dtype(self.weight))
            latent_init(self.direction, config)(initial)
            self.weight.copy_(initial)

    @override
    def forward(self, rows: Tensor) -> Tensor:
        """From rows `[T, D]` to `[T, L]`, or back."""
        return F.linear(rows, self.weight)
