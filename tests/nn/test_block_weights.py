"""The tables in a checkpoint: cells, whatever the block size and the ranks are."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_sffn.nn.config import INITIALIZATIONS, SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.nn.init import block_weight_init
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.hashing import seed_of
from tests.support.engine import whole
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case, D, build, draw

M = 48
"""Cells of the layer of `tests.support.router_cases`."""


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


@pytest.mark.parametrize("router", ["lorkm", "pkm"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_narrow_keys_or_none(router: str, ranks: int) -> None:
    results = run_ranks(ranks, saved, Case(router=router), expert_model_parallel_size=ranks)
    assert all(same for *_, same in results)
    tables = whole([part for found, *_ in results for part in found])
    ((_, one, _),) = run_ranks(1, saved, Case(router=router))
    assert {f"layer.{name}" for name in one} == set(tables)
    assert set(one) == ({"values"} if router == "pkm" else {"keys", "values"})
    for name, table in one.items():
        assert torch.equal(tables[f"layer.{name}"], table.flatten(0, 1)), name
    assert tables["layer.values"].shape[1] == D
    assert router == "pkm" or tables["layer.keys"].shape == (M, 6)


def config_with(initialization: str | None, router: str) -> SparseFFNTransformerConfig:
    """3 layers of width 20, blocks of 8 cells, 384 in all."""
    return SparseFFNTransformerConfig(
        num_layers=3,
        hidden_size=20,
        num_attention_heads=1,
        add_bias_linear=False,
        init_method_std=0.07,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        sffn=SparseFFNConfig(
            active_cells=32,
            block_size=8,
            expansion=12,
            router=ROUTERS[router](),
            initialization=initialization,
        ),
    )


STDS = {
    "megatron": (0.07, 0.07 / math.sqrt(2 * 3)),
    "sigma-moe": (math.sqrt(2 / (3 * 20)), math.sqrt(2 / (3 * 384))),
    "sigma-moe-block": (math.sqrt(2 / (3 * 20)), math.sqrt(2 / (3 * 8))),
    "pkm": (0.07, 1 / math.sqrt(20)),
}
"""Of keys and of values."""


@pytest.mark.parametrize("router", ["avg-k", "sigma-moe"])
@pytest.mark.parametrize("initialization", [None, *INITIALIZATIONS])
def test_initial_standard_deviations(initialization: str | None, router: str) -> None:
    config = config_with(initialization, router)
    assert set(STDS) == set(INITIALIZATIONS)
    default = {"avg-k": "megatron", "sigma-moe": "sigma-moe"}[router]
    torch.manual_seed(0)
    for draws, std in zip(block_weight_init(config), STDS[initialization or default], strict=True):
        table = torch.empty(200, 200)
        draws(table)
        assert table.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * 200**2))
        assert abs(table.mean().item()) < 5 * std / 200


def test_layers_draw_what_their_init_says(one_rank: None) -> None:
    for initialization, stds in STDS.items():
        layer = SparseFFN(config_with(initialization, "avg-k"), layer_number=2)
        for table, std in zip(layer.experts(), stds, strict=True):
            assert table.std().item() == pytest.approx(std, rel=0.05)


def test_each_block_draws_from_a_seed_of_its_own(one_rank: None) -> None:
    config = config_with(None, "avg-k")
    keys, values = SparseFFN(config, layer_number=2).experts()
    state = torch.random.get_rng_state()
    for block in (0, 7, 47):
        torch.manual_seed((seed_of(config.sffn.seed, 2) + block) % 2**32)
        for table, draws in zip((keys, values), block_weight_init(config), strict=True):
            drawn = torch.empty(8, 20)
            draws(drawn)
            assert torch.equal(table[block].detach(), drawn)
    torch.random.set_rng_state(state)
    SparseFFN(config, layer_number=2)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is left alone"


class Copies(TorchFunctionMode):
    """Keeps what is copied from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and args[0].device.type != "cpu":
            self.sources.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_on_another_device_start_from_the_bits_of_the_cpu(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    config = config_with(None, "avg-k")
    config.params_dtype = dtype
    expected = SparseFFN(config, layer_number=2).experts()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with Copies() as copies:
        layer = SparseFFN(config, layer_number=2)
    assert {table.device.type for table in layer.experts()} == {"meta"}
    assert len(copies.sources) == 2, "a table is one copy"
    for table, source in zip(expected, copies.sources, strict=True):
        assert torch.equal(table, source)
