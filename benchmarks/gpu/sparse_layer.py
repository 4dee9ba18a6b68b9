"""Builds a sparse layer as Megatron does, in bf16, with process groups of size one."""

from __future__ import annotations

from typing import Any

import torch


def sparse_layer(
    router: str,
    device: torch.device,
    *,
    width: int,
    active: int,
    g: int = 4,
    expansion: int = 4,
    backend: str = "auto",
) -> Any:
    """A layer in training mode.

    Args:
        router: name of the router; one that is not defined for these sizes gets those of the tests.
        device: device of the weights.
        width: D.
        active: k.
        g: cells per block.
        expansion: E.
        backend: backend of `block_ffn`.
    """
    from megatron_sffn.nn.config import Backend, SparseFFNConfig
    from megatron_sffn.nn.layer import layer_class
    from megatron_sffn.nn.routers import ROUTERS
    from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

    test_numbers = ROUTERS[router].test_numbers
    balance: dict[str, Any] = {"moe_router_load_balancing_type": "none"}
    if router == "switch":
        balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    config = SparseFFNTransformerConfig(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=2,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        # Our initialisation draws on the CPU, for equal bits everywhere: minutes at real sizes.
        perform_initialization=False,
        sffn=SparseFFNConfig(
            active_cells=active,
            router=ROUTERS[router](**test_numbers.options),
            backend=Backend(backend),
            block_size=1 if test_numbers.single_cells else g,
            expansion=16 if test_numbers.square_blocks else expansion,
        ),
        **balance,
    )
    layer = layer_class(Backend(backend))(config, layer_number=1).to(device).train()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0.0, 0.02)
    return layer
