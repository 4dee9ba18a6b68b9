"""Qwen3-MoE's sparse block, by transformers' own class, with and without `norm_topk_prob`.

With it (Qwen3-30B-A3B) the gates are renormalised over the chosen blocks, `--sffn-gate
softmax-chosen`; without, they are Switch's. Its balance loss is Mixtral's function.
"""

from __future__ import annotations

import pytest
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

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


@pytest.mark.parametrize(("norm_topk_prob", "gate"), [(True, "softmax-chosen"), (False, "softmax")])
def test_qwen3_moes_block_computes_the_same(norm_topk_prob: bool, gate: str) -> None:
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=4, num_experts=12, norm_topk_prob=norm_topk_prob
    )
    layer = sparse_layer(gate)
    block = with_weights_of(layer, Qwen3MoeSparseMoeBlock(eager(config)))
    assert_same(sffn_outcome(layer), block_outcome(block), tolerance=FP32)
