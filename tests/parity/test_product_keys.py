"""Product-key memory (Lample et al. 2019, arXiv 1907.05242), by its paper's formulas.

Our layer has no batch norm of the queries: it would make a token depend on the rest of its batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.compare import assert_same, copies_of, formula, sffn_outcome
from tests.support.router_cases import Case, build

pytestmark = pytest.mark.usefixtures("one_rank")


def test_product_keys_compute_the_papers_formulas() -> None:
    layer = build(Case(router="pkm"))
    settings = layer.router.sffn.router
    heads, key_size = settings.heads, settings.key_size
    with torch.no_grad():
        layer.router.query_bias.copy_(torch.linspace(-0.5, 0.5, heads * key_size))
    per_head = 8  # of 16 active cells
    side = 16  # of 256 values

    def lample(
        x: Tensor, values: Tensor, query: Tensor, query_bias: Tensor, subkeys: Tensor
    ) -> Tensor:
        outputs = torch.zeros_like(x)
        queries = (x @ query.T + query_bias).unflatten(1, (heads, key_size))
        for head in range(heads):
            row_query, column_query = queries[:, head].chunk(2, dim=1)
            # The best scores of each half, and the best sums of these scores.
            row_scores, rows = (row_query @ subkeys[head, 0].T).topk(per_head)
            column_scores, columns = (column_query @ subkeys[head, 1].T).topk(per_head)
            sums = (row_scores[:, :, None] + column_scores[:, None, :]).flatten(1)
            scores, positions = sums.topk(per_head)
            cells = rows.gather(1, positions // per_head) * side + columns.gather(
                1, positions % per_head
            )
            outputs = outputs + F.embedding_bag(
                cells, values[:, 0], per_sample_weights=scores.softmax(dim=1), mode="sum"
            )
        return outputs

    assert_same(sffn_outcome(layer), formula(lample, copies_of(layer)))
