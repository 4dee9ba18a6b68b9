"""A sparse feed-forward layer for a plain PyTorch model: one device, no process groups.

Inputs: hidden states `[..., s, D]`, batch first. Outputs: their update, of the same shape.

Design notes: this is `SparseFFN` with process groups of one rank, whatever torch.distributed is
doing, so that a model with it can be wrapped in PyTorch's own DistributedDataParallel. What
Megatron's training loop does for the layer after a step, `finish_step` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, override

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.expert_grid import one_rank_groups
from megatron_sffn.nn.layer import (
    SparseFFN,
    end_step,
    setting_that_needs_groups,
    sparse_layers,
)
from megatron_sffn.nn.load_balancing import LoadBalancing
from megatron_sffn.nn.routers.dense import DenseConfig
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import Activation
from megatron_sffn.utils.errors import ConfigError

ACTIVATIONS: dict[Activation, Callable[..., Tensor]] = {
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
    Activation.SQUARED_RELU: squared_relu,
    Activation.SWIGLU: F.silu,
    Activation.QUICK_GEGLU: quick_gelu,
}
"""Activation -> the function that Megatron's config has for it."""

_DEFAULTS = {"moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32"}
"""Fields of Megatron's config that differ from its defaults, without which it adds a loss, or warns
that scores are not in fp32, in which our routers always compute them."""


class StandaloneSparseFFN(torch.nn.Module):
    """A sparse feed-forward layer in place of the MLP of a plain PyTorch model.

    Args:
        hidden_size: D.
        sffn: the layer's numbers and router.
        activation: `gelu`, `relu`, `squared_relu`, `swiglu` or `quick_geglu`.
        layer_number: of this layer in its model, counted from 1. It seeds the weights and the map
            of `rand-hash`, so that two layers differ.
        num_layers: layers of the model, by which initial values are scaled.
        vocab_size: number of token ids, if known: `rand-hash` then makes a table of its map.
        dtype: of the weights.
        megatron: further fields of Megatron's `TransformerConfig` by name, such as
            `moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01`.

    Raises:
        ConfigError: the numbers do not fit, or the layer needs what only Megatron's loop has.
    """

    def __init__(
        self,
        hidden_size: int,
        sffn: SparseFFNConfig,
        *,
        activation: str = "gelu",
        layer_number: int = 1,
        num_layers: int = 1,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        **megatron: Any,
    ) -> None:
        super().__init__()
        _check(sffn, activation, layer_number, num_layers)
        config = SparseFFNTransformerConfig(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=1,  # the layer has no attention, but Megatron validates the number
            add_bias_linear=False,
            activation_func=ACTIVATIONS[Activation(activation)],
            gated_linear_unit=Activation(activation).gated,
            params_dtype=dtype,
            padded_vocab_size=vocab_size,
            sffn=sffn,
            **_DEFAULTS | megatron,
        )
        self.ffn = SparseFFN(config, layer_number, one_rank_groups())

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Update the hidden states.

        Args:
            x: `[..., s, D]`, for example `[batch, sequence, D]`.
            token_ids: `[..., s]` input ids, for `rand-hash`.
        """
        x_bsD = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x[None, None]
        if token_ids is None and self.ffn.config.sffn.router.needs_token_ids:
            raise ConfigError(
                f"--sffn-router {self.ffn.config.sffn.router.name} chooses blocks by token ids; "
                "call the layer as layer(x, token_ids)"
            )
        keys_bs = None
        if token_ids is not None:
            router = self.ffn.config.sffn.router
            keys_bs = router.token_keys(token_ids.reshape(x_bsD.shape[:2]))
        update, _ = self.ffn(x_bsD.transpose(0, 1), padding_mask=keys_bs)
        result: Tensor = update.transpose(0, 1).reshape(x.shape)
        return result

    def auxiliary_losses(self) -> dict[str, float]:
        """Unweighted auxiliary losses, summed over the training passes since the last call.

        They are for a log: the backward pass of the output adds their gradients itself.
        """
        balance = getattr(self.ffn.router, "balance", None)
        losses = {} if balance is None else balance.take_values()
        return {name: float(value) for name, value in losses.items()}

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast as `torch.nn.Module` does; counters move along, and stay in their dtype."""
        super()._apply(fn, recurse)
        place = self.ffn.experts.values.device
        for module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):  # neither a parameter nor a buffer
                    setattr(module, name, value.to(place))
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()  # type: ignore[operator]
        return self


def finish_step(model: torch.nn.Module) -> None:
    """Do what Megatron's loop does for sparse layers when a step's backward passes are over.

    Moving-average descriptors (`avg-k`), the expert bias, the prices of quantile balancing and the
    token counts of `global_aux_loss` need it; without any of them it does nothing.

    Args:
        model: the model, before or after the optimizer step.
    """
    end_step(model)
    for layer in sparse_layers(model):
        balance = getattr(layer.router, "balance", None)
        if balance is None:
            continue
        balance.reset_global_aux_loss_tracker()
        if balance.biased:
            counts = balance.local_tokens_per_expert
            step = torch.sign(counts.mean() - counts)
            balance.expert_bias += step * layer.config.moe_router_bias_update_rate
            counts.zero_()
        if balance.priced:
            _update_prices(balance, layer.config.moe_router_quantile_balancing_ema)


@torch.no_grad()
def _update_prices(balance: LoadBalancing, ema: float) -> None:
    """Megatron's update of the prices of quantile balancing, on one rank."""
    prices = balance.qb_beta_accum / balance.qb_beta_count.clamp(min=1)
    prices = ema * balance.qb_beta + (1 - ema) * prices
    balance.qb_beta.copy_(prices - prices.mean())
    balance.qb_beta_accum.zero_()
    balance.qb_beta_count.zero_()


def _check(sffn: SparseFFNConfig, activation: str, layer_number: int, num_layers: int) -> None:
    """Refuse what a layer outside of Megatron's loop cannot be."""
    if isinstance(sffn.router, DenseConfig):
        raise ConfigError(
            "--sffn-router dense is Megatron's own MLP, not a sparse layer; use torch.nn.Linear"
        )
    if setting := setting_that_needs_groups(sffn):
        raise ConfigError(
            f"{setting} needs Megatron's process groups, which a standalone layer does not have; "
            "leave it out, or train with megatron_sffn.pretrain"
        )
    if sffn.layers_per_table > 1:
        raise ConfigError(
            f"layers_per_table={sffn.layers_per_table} is about the layers of a model, which a "
            "standalone layer does not know; leave it out"
        )
    if activation not in list(Activation):
        raise ConfigError(
            f"activation={activation!r} is unknown; choose from {', '.join(Activation)}"
        )
    if not 1 <= layer_number <= num_layers:
        raise ConfigError(
            f"layer_number={layer_number} is not from 1 to num_layers={num_layers}; count the "
            "layers of the model from 1"
        )
