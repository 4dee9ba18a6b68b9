"""OLMoE's sparse block, by transformers' own class: Switch's gate with K of B blocks, SwiGLU.

Its published models have `norm_topk_prob` off, so that gates are probabilities among all blocks;
its balance loss is Mixtral's function.
"""

from __future__ import annotations

import pytest
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from tests.parity.compare import assert_same, sffn_outcome
from tests.parity.transformers_blocks import (
    FP32,
    SIZES,
    block_outcome,
    eager,
    sparse_layer,
    with_weights_of,
)

pytestmark = pytest.mark.usefixtures("one_rank")


def test_olmoes_block_computes_the_same() -> None:
    config = OlmoeConfig(**SIZES, intermediate_size=4, num_experts=12)
    assert config.norm_topk_prob is False
    layer = sparse_layer("softmax")
    block = with_weights_of(layer, OlmoeSparseMoeBlock(eager(config)))
    assert_same(sffn_outcome(layer), block_outcome(block), tolerance=FP32)
