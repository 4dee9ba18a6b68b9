"""Mixtral's sparse block, by transformers' own class: `--sffn-gate softmax-chosen`, SwiGLU.

Where our balance loss differs, by design: Mixtral's shares of the choices add up to K, ours to 1
(as Megatron's); Mixtral takes means over the tokens of all layers together, we add up the losses of
the layers.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from tests.parity.compare import assert_same, sffn_outcome
from tests.parity.transformers_blocks import (
    FP32,
    SIZES,
    block_outcome,
    eager,
    sparse_layer,
    with_weights_of,
)
from tests.support.router_cases import draw

pytestmark = pytest.mark.usefixtures("one_rank")

ACTIVE, BLOCKS = 4, 12
WEIGHT = 0.05


def test_mixtrals_block_and_balance_loss_compute_the_same() -> None:
    config = eager(MixtralConfig(**SIZES, intermediate_size=4, num_local_experts=BLOCKS))
    # Our coefficient is Mixtral's times K.
    layer = sparse_layer("softmax-chosen", balance=WEIGHT * ACTIVE)
    block = with_weights_of(layer, MixtralSparseMoeBlock(config))
    reference = block_outcome(
        block, lambda logits: WEIGHT * load_balancing_loss_func((logits,), BLOCKS, ACTIVE)
    )
    assert_same(sffn_outcome(layer), reference, tolerance=FP32)


def test_mixtrals_balance_loss_pools_layers() -> None:
    layers = (draw(1, 50, BLOCKS), draw(2, 50, BLOCKS) + draw(3, BLOCKS))
    shares, probabilities = [], []
    for logits in layers:
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(ACTIVE).indices, 1.0)
        shares.append(chosen.mean(dim=0) / ACTIVE)
        probabilities.append(logits.softmax(dim=1).mean(dim=0))
    losses = [
        BLOCKS * (share * mean).sum() for share, mean in zip(shares, probabilities, strict=True)
    ]
    for logits, loss in zip(layers, losses, strict=True):
        alone = load_balancing_loss_func((logits,), BLOCKS, ACTIVE)
        assert float(alone) == pytest.approx(ACTIVE * float(loss), rel=FP32)
    pooled = BLOCKS * ACTIVE * (torch.stack(shares).mean(0) * torch.stack(probabilities).mean(0))
    together = load_balancing_loss_func(layers, BLOCKS, ACTIVE)
    assert float(together) == pytest.approx(float(pooled.sum()), rel=FP32)
    assert float(together) != pytest.approx(ACTIVE * float(sum(losses)) / 2, rel=0.05)
