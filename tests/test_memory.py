"""The tables in a checkpoint: cells, whatever the block size and the ranks are."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from tests.distributed.engine import whole
from tests.layers import Case, D, build, draw
from tests.ranks import run_ranks

M = 48
"""Cells of the layer of `tests.layers`."""


def saved(case: Case) -> tuple[list, dict[str, Tensor], bool]:
    """This rank's parts of the checkpoint, its tables, and whether loading brings them back."""
    memory = build(case).experts
    tables = {name: table.detach().clone() for name, table in memory.named_parameters()}
    found, same = [], True
    for name, factory in memory.sharded_state_dict("layer.").items():
        pieces = factory.build()
        for piece in nested_values(pieces):
            found.append((piece.key, piece.global_shape, piece.global_offset, piece.data))
        loaded = {part: [piece.data for piece in some] for part, some in pieces.items()}
        same &= torch.equal(factory.merge_fn(loaded), tables[name.removeprefix("layer.")])
    return found, tables, same


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("ranks", "expert", "cells"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_a_checkpoint_holds_cells(ranks: int, expert: int, cells: int, swiglu: bool) -> None:
    case = Case(router="avg-k", block_size=4, swiglu=swiglu)
    groups = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": cells}
    results = run_ranks(ranks, saved, case, **groups)
    assert all(same for *_, same in results)
    tables = whole([part for found, *_ in results for part in found])
    ((_, one, _),) = run_ranks(1, saved, case)
    blocks = M // 4
    assert torch.equal(tables["layer.values"], one["values"].view(M, D))
    if swiglu:
        gate, up = one["keys"].view(blocks, 2, 4, D).unbind(1)
        assert torch.equal(tables["layer.gate_keys"], gate.reshape(M, D))
        assert torch.equal(tables["layer.keys"], up.reshape(M, D))
    else:
        assert torch.equal(tables["layer.keys"], one["keys"].view(M, D))


def cut_again(swiglu: bool) -> list[Tensor]:
    """Outputs of all cells at g = 4, and at g = 8 after loading the other's checkpoint."""
    layers = [build(Case(router="avg-k", block_size=g, swiglu=swiglu)).experts for g in (4, 8)]
    fine, coarse = (memory.sharded_state_dict() for memory in layers)
    with torch.no_grad():
        for name, table in layers[1].named_parameters():
            loaded = {
                part: [torch.cat([piece.data for piece in pieces])]
                for part, pieces in fine[name].build().items()
            }
            table.copy_(coarse[name].merge_fn(loaded))
    x, results = draw(1, 5, D), []
    for memory in layers:
        keys, values = memory()
        every = torch.einsum("td,bgd->btg", x, keys)
        results.append(torch.einsum("btg,bgd->td", memory_activation(every, swiglu), values))
    return [result.detach() for result in results]


def memory_activation(up: Tensor, swiglu: bool) -> Tensor:
    if not swiglu:
        return torch.nn.functional.gelu(up)
    gate, linear = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


@pytest.mark.parametrize("swiglu", [False, True])
def test_another_block_size_is_the_same_memory(swiglu: bool) -> None:
    ((fine, coarse),) = run_ranks(1, cut_again, swiglu)
    torch.testing.assert_close(fine, coarse, rtol=1e-12, atol=1e-14)
