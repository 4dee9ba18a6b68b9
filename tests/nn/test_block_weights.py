"""Block weights: their form in a checkpoint on every layout, and how they are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_sffn.nn.config import INITIALIZATIONS, SparseFFNConfig
from megatron_sffn.nn.init import block_weight_init
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.hashing import seed_of
from tests.support.engine import whole_tensors
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case, D, build, draw

M = 48
"""Cells of the layer of `tests.support.router_cases`."""


def saved(case: Case) -> tuple[list, dict[str, Tensor], bool]:
    """This rank's shards in a checkpoint, its tables, and whether loading restores the tables."""
    block_weights = build(case).experts
    tables = {name: table.detach().clone() for name, table in block_weights.named_parameters()}
    shards, is_restored = [], True
    for name, factory in block_weights.sharded_state_dict("layer.").items():
        shards_by_name = factory.build()
        for shard in nested_values(shards_by_name):
            shards.append((shard.key, shard.global_shape, shard.global_offset, shard.data))
        loaded = {key: [shard.data for shard in value] for key, value in shards_by_name.items()}
        is_restored &= torch.equal(factory.merge_fn(loaded), tables[name.removeprefix("layer.")])
    return shards, tables, is_restored


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("ranks", "ep", "etp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_a_checkpoint_holds_tables_of_cells(ranks: int, ep: int, etp: int, swiglu: bool) -> None:
    case = Case(router="avg-k", block_size=4, swiglu=swiglu)
    groups = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    results = run_ranks(ranks, saved, case, **groups)
    assert all(is_restored for *_, is_restored in results)
    tables = whole_tensors([shard for shards, *_ in results for shard in shards])
    ((_, expected, _),) = run_ranks(1, saved, case)
    blocks = M // 4
    assert torch.equal(tables["layer.values"], expected["values"].view(M, D))
    if swiglu:
        gate, up = expected["keys"].view(blocks, 2, 4, D).unbind(1)
        assert torch.equal(tables["layer.gate_keys"], gate.reshape(M, D))
        assert torch.equal(tables["layer.keys"], up.reshape(M, D))
    else:
        assert torch.equal(tables["layer.keys"], expected["keys"].view(M, D))


def outputs_of_both_block_sizes(swiglu: bool) -> list[Tensor]:
    """Outputs of all cells in blocks of 4, and in blocks of 8 loaded from their checkpoint."""
    fine, coarse = (
        build(Case(router="avg-k", block_size=g, swiglu=swiglu)).experts for g in (4, 8)
    )
    fine_factories, coarse_factories = fine.sharded_state_dict(), coarse.sharded_state_dict()
    with torch.no_grad():
        for name, table in coarse.named_parameters():
            loaded = {
                key: [torch.cat([shard.data for shard in shards])]
                for key, shards in fine_factories[name].build().items()
            }
            table.copy_(coarse_factories[name].merge_fn(loaded))
    x, outputs = draw(1, 5, D), []
    for block_weights in (fine, coarse):
        keys, values = block_weights()
        pre_activations = torch.einsum("td,bgd->btg", x, keys)
        coefficients = activation(pre_activations, swiglu)
        outputs.append(torch.einsum("btg,bgd->td", coefficients, values))
    return [output.detach() for output in outputs]


def activation(pre_activations: Tensor, swiglu: bool) -> Tensor:
    if not swiglu:
        return torch.nn.functional.gelu(pre_activations)
    gate, up = pre_activations.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_checkpoint_loaded_with_another_block_size_has_the_same_cells(swiglu: bool) -> None:
    ((fine, coarse),) = run_ranks(1, outputs_of_both_block_sizes, swiglu)
    torch.testing.assert_close(fine, coarse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("router", ["lorkm", "pkm"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_holds_narrow_keys_or_none(router: str, ranks: int) -> None:
    results = run_ranks(ranks, saved, Case(router=router), expert_model_parallel_size=ranks)
    assert all(is_restored for *_, is_restored in results)
    tables = whole_tensors([shard for shards, *_ in results for shard in shards])
    ((_, expected, _),) = run_ranks(1, saved, Case(router=router))
    assert {f"layer.{name}" for name in expected} == set(tables)
    assert set(expected) == ({"values"} if router == "pkm" else {"keys", "values"})
    for name, table in expected.items():
        assert torch.equal(tables[f"layer.{name}"], table.flatten(0, 1)), name
    assert tables["layer.values"].shape[1] == D
    if router == "lorkm":
        rank = ROUTERS["lorkm"].test_numbers.options["rank"]
        assert tables["layer.keys"].shape == (M, rank)


def config_with(initialization: str | None, router: str) -> SparseFFNTransformerConfig:
    """A model of 3 layers and width 20, with 384 cells in blocks of 8."""
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
"""`--sffn-init` -> standard deviations of keys and of values."""


@pytest.mark.parametrize("router", ["avg-k", "sigma-moe"])
@pytest.mark.parametrize("initialization", [None, *INITIALIZATIONS])
def test_keys_and_values_are_drawn_with_the_std_of_their_init(
    initialization: str | None, router: str
) -> None:
    config = config_with(initialization, router)
    assert set(STDS) == set(INITIALIZATIONS)
    default = {"avg-k": "megatron", "sigma-moe": "sigma-moe"}[router]
    torch.manual_seed(0)
    stds = STDS[initialization or default]
    for init_method, std in zip(block_weight_init(config), stds, strict=True):
        table = torch.empty(200, 200)
        init_method(table)
        assert table.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * 200**2))
        assert abs(table.mean().item()) < 5 * std / 200


def test_a_layer_draws_its_block_weights_with_the_std_of_their_init(one_rank: None) -> None:
    for initialization, stds in STDS.items():
        layer = SparseFFN(config_with(initialization, "avg-k"), layer_number=2)
        for table, std in zip(layer.experts(), stds, strict=True):
            assert table.std().item() == pytest.approx(std, rel=0.05)


def test_each_block_is_drawn_from_a_seed_of_its_own(one_rank: None) -> None:
    config = config_with(None, "avg-k")
    keys, values = SparseFFN(config, layer_number=2).experts()
    state = torch.random.get_rng_state()
    for block in (0, 7, 47):
        torch.manual_seed((seed_of(config.sffn.seed, 2) + block) % 2**32)
        for table, init_method in zip((keys, values), block_weight_init(config), strict=True):
            drawn = torch.empty(8, 20)
            init_method(drawn)
            assert torch.equal(table[block].detach(), drawn)
    torch.random.set_rng_state(state)
    SparseFFN(config, layer_number=2)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator has changed"


class Copies(TorchFunctionMode):
    """Records the tensors that are copied to another device than the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and args[0].device.type != "cpu":
            self.sources.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_on_another_device_have_the_bits_of_tables_on_the_cpu(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    config = config_with(None, "avg-k")
    config.params_dtype = dtype
    expected = SparseFFN(config, layer_number=2).experts()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with Copies() as copies:
        layer = SparseFFN(config, layer_number=2)
    assert {table.device.type for table in layer.experts()} == {"meta"}
    assert len(copies.sources) == 2, "each table must be copied once"
    for table, source in zip(expected, copies.sources, strict=True):
        assert torch.equal(table, source)
