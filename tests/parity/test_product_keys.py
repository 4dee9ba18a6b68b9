"""Product-key memory (Lample et al. 2019, arXiv 1907.05242), by its paper's formulas.

Ours has no batch norm of the queries: it would make a token depend on the others of its batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.compare import assert_same, copies_of, formula, ours
from tests.support.router_cases import Case, build

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_memory_of_product_keys() -> None:
    layer = build(Case(router="pkm"))
    with torch.no_grad():
        layer.router.query_bias.copy_(torch.linspace(-0.5, 0.5, 12))
    heads, each = 2, 8  # 16 active cells
    side = 16  # of 256 values

    def lample(
        x: Tensor, values: Tensor, query: Tensor, query_bias: Tensor, subkeys: Tensor
    ) -> Tensor:
        outputs = torch.zeros_like(x)
        queries = (x @ query.T + query_bias).unflatten(1, (heads, 6))
        for head in range(heads):
            left, right = queries[:, head].chunk(2, dim=1)
            # The best of each half, and the best sums of those.
            first, rows = (left @ subkeys[head, 0].T).topk(each)
            second, columns = (right @ subkeys[head, 1].T).topk(each)
            sums = (first[:, :, None] + second[:, None, :]).flatten(1)
            scores, places = sums.topk(each)
            cells = rows.gather(1, places // each) * side + columns.gather(1, places % each)
            outputs = outputs + F.embedding_bag(
                cells, values[:, 0], per_sample_weights=scores.softmax(dim=1), mode="sum"
            )
        return outputs

    assert_same(ours(layer), formula(lample, copies_of(layer)))
