"""Hash layers (Roller et al. 2021, arXiv 2106.04426): the expert of a token is that of its id.

Where our layer differs, by design: for several active blocks the paper's MultiHash takes a slice of
each of K experts and concatenates the slices; P1's RandHash, and our layer, adds up K distinct
blocks. The paper's balanced assignment gives an id to the emptiest of all experts, ours to the
emptiest of a subset of them, which each layer draws anew.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.routers.balanced_map import balanced_map
from tests.parity.compare import assert_same, copies_of, formula, sffn_outcome
from tests.support.router_cases import VOCAB, Case, build, inputs

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("g", [16, 4])
def test_the_experts_of_a_token_are_those_of_its_id(g: int) -> None:
    layer = build(Case(router="rand-hash", block_size=g))
    _, ids, _ = inputs()
    # [V, K]: the random map that is fixed before training.
    experts_of_id = layer.router(torch.empty(VOCAB, 0), None, torch.arange(VOCAB)).block_ids
    assert experts_of_id.shape == (VOCAB, 16 // g)

    def roller(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        outputs = []
        for token, id_of_token in zip(x, ids.T.flatten(), strict=True):
            expert_outputs = [
                F.gelu(token @ keys[expert].T) @ values[expert]
                for expert in experts_of_id[id_of_token]
            ]
            outputs.append(torch.stack(expert_outputs).sum(dim=0))
        return torch.stack(outputs)

    assert_same(sffn_outcome(layer, ids), formula(roller, copies_of(layer)))


@pytest.mark.parametrize("experts", [4, 16, 64])
def test_the_balanced_assignment_is_as_even_as_that_of_the_paper(experts: int) -> None:
    counts = 1_000_000 // torch.arange(1, 2001)  # Zipf's law
    paper = torch.zeros(experts, dtype=torch.int64)
    for count in counts:  # the most frequent first
        paper[paper.argmin()] += count
    blocks_V = balanced_map(counts, num_blocks=experts, num_active=1, key=1)[:, 0].long()
    ours = torch.zeros(experts, dtype=torch.int64).index_add(0, blocks_V, counts)
    assert ours.max() <= 1.001 * paper.max()
    assert ours.min() >= 0.999 * paper.min()
