"""Hash layers (Roller et al. 2021, arXiv 2106.04426): the expert of a token is that of its id.

Where our layer differs, by design: for several active blocks the paper's MultiHash takes a slice of
each of K experts and concatenates the slices; P1's RandHash, and our layer, adds up K distinct
blocks.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
