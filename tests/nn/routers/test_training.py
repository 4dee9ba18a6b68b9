"""The router's own weights are trained, or the configuration is refused: every router, on a grid.

The test does not repeat the rule of the code: it builds and differentiates every combination of
active blocks, gate and balance loss, and compares the gradient with whether the code refuses it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.gates import GATES
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import D, T
from tests.support.router_cases import SPARSE

LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    {"moe_z_loss_coeff": 0.1},
    {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 1e-3},
)
"""No loss, two losses that differentiate scores, and a bias, which does not."""
LEAST = 1e-9
"""Smaller gradients are rounding errors: true gradients of the grid are above 1e-6."""


def configurations(name: str) -> list[tuple[RouterConfig, dict[str, Any]]]:
    """Router configs and numbers of a layer with one, two, or all of its blocks active."""
    configs: list[tuple[RouterConfig, dict[str, Any]]] = []
    test_numbers = ROUTERS[name].test_numbers
    options = {**test_numbers.options, **({"noise": 1.0} if name == "noisy-top-k" else {})}
    cells = 1 if test_numbers.single_cells else 2
    if not issubclass(ROUTERS[name], ScoredConfig):
        for active in (1, 2, 4):
            numbers = {"active_cells": active, "block_size": 1, "expansion": 16 // active * 4}
            for heads in (1, 2, 4) if "heads" in options else (None,):
                fields = options if heads is None else {**options, "heads": heads}
                if heads is None or active % heads == 0:
                    configs.append((ROUTERS[name](**fields), numbers))
        return configs
    descriptors = ({}, {"descriptor": "learned"}) if name == "avg-k" else ({},)
    entropies = (0.0, 0.1)
    gates = () if name == "remoe" else GATES  # it refuses all but its own
    for (active, expansion), gate, losses, entropy, descriptor in itertools.product(
        ((1, 1), (1, 6), (2, 3), (4, 1)), (None, *gates), LOSSES, entropies, descriptors
    ):
        fields = {**options, **descriptor, "gate": gate, "entropy_coefficient": entropy}
        numbers = {"active_cells": active * cells, "block_size": cells, "expansion": expansion}
        configs.append((ROUTERS[name](**fields), numbers | losses))
    return configs


def tokens_and_keys(sffn: SparseFFNConfig) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens `[T, D]`, keys `[B, G, key width]` if there are any, and input ids `[T]`."""
    width = sffn.router.key_width(D)
    keys = torch.randn(sffn.num_blocks, sffn.block_size, width, dtype=torch.float64)
    return torch.randn(T, D, dtype=torch.float64), keys if width else None, torch.arange(T)


def largest_gradients(router: Any) -> dict[str, float]:
    """Largest gradient of each of the router's weights in a layer of random tokens and keys."""
    torch.manual_seed(0)
    x, keys, token_ids = tokens_and_keys(router.sffn)
    values = torch.randn(router.sffn.num_blocks, D, dtype=torch.float64)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randn(weight.shape))
    routing = router(x, keys, token_ids)
    # As in a layer, the outputs of the blocks depend on the queries and are weighted by the gates.
    queries = x if routing.queries is None else routing.queries
    outputs: Tensor = values[routing.block_ids] * (1 + queries.sum(dim=1)[:, None, None])
    if routing.gates is not None:
        outputs = outputs * routing.gates[:, :, None]
    update = router.project_sums(outputs.sum(dim=1), x)
    if update.requires_grad:
        (update * torch.randn(update.shape)).sum().backward()
    return {
        name: 0.0 if weight.grad is None else float(weight.grad.abs().max())
        for name, weight in router.named_parameters()
    }


@pytest.mark.parametrize("name", SPARSE)
def test_a_routers_weights_get_a_gradient_or_the_configuration_is_refused(
    name: str, build: Callable[..., Any]
) -> None:
    trained = refused = 0
    for config, numbers in configurations(name):
        case = f"{config} {numbers}"
        try:
            router = build(config, **numbers)
        except ConfigError as error:
            refused += 1
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(config), "untrained", lambda self, config: None)
                patch.setattr(ScoredConfig, "_constant_gate", lambda self, sffn: None)
                router = build(config, **numbers)
            if "has no effect" in str(error):
                assert not router.settings.scores_have_weights, case
                gates = router(*tokens_and_keys(router.sffn)).gates
                assert torch.equal(gates, torch.ones_like(gates)), case
                continue
            # The rule refuses nothing that would train.
            assert "no gradient reaches the weights" in str(error), case
            assert min(largest_gradients(router).values()) < LEAST, case
            continue
        gradients = largest_gradients(router)
        assert min(gradients.values(), default=math.inf) > LEAST, f"{case}: {gradients}"
        trained += 1
    assert trained, "every router can be trained"
    is_never_refused = name in ("rand-hash", "pkm-relu", "pkm-ffn", "remoe")
    assert bool(refused) != is_never_refused


def test_noise_that_is_off_leaves_only_its_own_weights_untrained(build: Any) -> None:
    router = build(ROUTERS["noisy-top-k"](noise=0.0))
    gradients = largest_gradients(router)
    # The model does not use them then.
    assert gradients["noise_weight"] == 0 and gradients["weight"] > LEAST


def test_the_gate_network_of_every_kind_is_trained(build: Any) -> None:
    for network in ("mlp", "attention"):
        gradients = largest_gradients(build(ROUTERS["switch"](network=network, network_width=5)))
        assert gradients.keys() == {"weight", "hidden"}
        assert min(gradients.values()) > LEAST
