"""Muon's step on tables of blocks equals the step of emerging-optimizers on each block alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import Muon
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import layer_wise_optimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn.parameter import Parameter

from megatron_sffn.nn.expert_grid import OneRankGroup
from megatron_sffn.patches import muon
from megatron_sffn.patches.registry import resolve

SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "fp32_matmul_prec": "highest",
}
GROUPS = SimpleNamespace(expt_tp=OneRankGroup())


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # Megatron's logger asks for it


def test_installing_muon_again_replaces_nothing() -> None:
    before = [getattr(*resolve(row.target)) for row in muon.PATCHES]
    muon.install()
    assert [getattr(*resolve(row.target)) for row in muon.PATCHES] == before


def table_of(
    matrices: list[Tensor], matrices_per_block: int, *, inputs_first: bool = False
) -> Parameter:
    """A table of blocks `[B, matrices_per_block · G, D]` with these matrices `[G, D]`."""
    table = Parameter(torch.stack(matrices).unflatten(0, (-1, matrices_per_block)).flatten(1, 2))
    table.block_matrices = matrices_per_block  # type: ignore[attr-defined]
    table.block_inputs_first = inputs_first  # type: ignore[attr-defined]
    return table


def steps(parameters: list[Parameter], gradients: list[list[Tensor]], optimizer: Any) -> None:
    for gradients_of_step in gradients:
        for parameter, gradient in zip(parameters, gradients_of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale_mode", ["spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize(("cells", "width"), [(5, 12), (12, 5), (1, 7), (6, 6)])
def test_a_step_on_a_table_is_a_step_on_each_of_its_matrices(
    cells: int, width: int, scale_mode: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three matrices at a time, of six.
    monkeypatch.setattr(muon, "MAX_NUMBERS", 3 * cells * width)
    draw = torch.Generator().manual_seed(1)
    matrices = [torch.randn(cells, width, generator=draw) for _ in range(6)]
    gradients = [[torch.randn(cells, width, generator=draw) for _ in matrices] for _ in range(3)]
    settings = {**SETTINGS, "scale_mode": scale_mode, "nesterov": nesterov}
    alone = [Parameter(matrix.clone()) for matrix in matrices]
    steps(alone, gradients, Muon(alone, **settings))
    table = table_of(matrices, matrices_per_block=2)
    table_gradients = [[table_of(step, 2).detach()] for step in gradients]
    steps([table], table_gradients, TensorParallelMuon([table], pg_collection=GROUPS, **settings))
    expected = table_of([parameter.detach() for parameter in alone], 2)
    torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(table, table_of(matrices, 2), atol=1e-2)


@pytest.mark.parametrize("scale_mode", ["spectral", "unit_rms_norm", "shape_scaling"])
def test_values_have_the_scale_of_a_linear_layers_weight(scale_mode: str) -> None:
    draw = torch.Generator().manual_seed(1)
    values, gradient = torch.randn(2, 5, 12, generator=draw)
    settings = {**SETTINGS, "scale_mode": scale_mode}
    weight = Parameter(values.mT.clone())  # [outputs, inputs]
    steps([weight], [[gradient.mT]], Muon([weight], **settings))
    table = table_of([values], 1, inputs_first=True)
    steps(
        [table], [[gradient[None]]], TensorParallelMuon([table], pg_collection=GROUPS, **settings)
    )
    torch.testing.assert_close(table[0].detach(), weight.mT.detach(), rtol=1e-4, atol=1e-5)


def test_a_block_of_one_cell_moves_by_its_normalised_momentum() -> None:
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    table = table_of([torch.zeros(1, 16)], matrices_per_block=1)
    settings = {**SETTINGS, "momentum": 0.0}
    steps([table], [[row[None]]], TensorParallelMuon([table], pg_collection=GROUPS, **settings))
    direction = -table.detach().flatten() / SETTINGS["lr"]
    torch.testing.assert_close(direction / direction.norm(), row[0] / row.norm())
    # Newton-Schulz brings the one singular value near 1, and the spectral scale is √16.
    assert 0.7 * 4 < direction.norm() < 1.3 * 4


def test_a_block_that_never_had_a_gradient_stays() -> None:
    ones = torch.ones(2, 3)
    table = table_of([ones, ones], matrices_per_block=1)
    settings = {**SETTINGS, "weight_decay": 0.0}
    gradient = table_of([ones, torch.zeros(2, 3)], 1).detach()
    steps([table], [[gradient]], TensorParallelMuon([table], pg_collection=GROUPS, **settings))
    assert torch.equal(table[1], ones)
    assert not torch.equal(table[0], ones)


def is_for_adam(parameter: Tensor) -> bool:
    """True if Megatron gives the parameter to the optimizer of embeddings and norms."""
    overrides = copy.deepcopy(megatron_optimizer._EMERGING_OPTIMIZERS["muon"])
    ((key, override),) = overrides.default_param_overrides.items()
    assert override == {"optimizer": "adam"}
    return bool(key.matches(parameter, "layers.0.mlp.weight"))


def test_muon_takes_matrices_and_tables_of_matrices_alone() -> None:
    embedding = Parameter(torch.zeros(4, 2))
    embedding.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
    assert is_for_adam(embedding)
    assert is_for_adam(Parameter(torch.zeros(4)))
    # The values of product keys, without keys of their own, are rows of their own.
    assert is_for_adam(Parameter(torch.zeros(4, 1, 2)))
    assert not is_for_adam(Parameter(torch.zeros(4, 2)))
    table = table_of([torch.zeros(3, 2)] * 4, matrices_per_block=1)
    assert not is_for_adam(table)
    for module in (megatron_optimizer, layer_wise_optimizer):
        assert module.is_managed_by_layer_wise_optimizer(table)


def test_the_master_copy_of_a_table_knows_its_matrices() -> None:
    table = table_of([torch.zeros(3, 2, dtype=torch.bfloat16)] * 4, matrices_per_block=2)
    master = table.detach().clone().float()
    copy_tensor_model_parallel_attributes(master, table)
    assert (master.block_matrices, master.block_inputs_first) == (2, False)
