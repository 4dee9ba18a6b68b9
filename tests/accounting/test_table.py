"""The table that a run prints."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_sffn import accounting
from megatron_sffn.nn.config import Backend
from megatron_sffn.nn.parallel_layout import ParallelLayout
from tests.accounting.models import paper


def test_the_table_shows_parameters_flops_and_sent_bytes() -> None:
    shape = paper(block_size=64)
    assert (
        accounting.table(shape, ParallelLayout(ep=4, dtype=torch.bfloat16))
        == """\
sparse feed-forward: avg-k, 64 of 1024 blocks of 64 cells (E = 16) in 4 of 24 layers
  parameters                            857.1 M
  active parameters                     353.8 M
  FLOPs per token, forward              916.6 M
  FLOPs over dense                     +0.924 %
  sent per token and layer, alltoall    12.4 kB
    with Megatron's alltoall           196.6 kB
    with Megatron's allgather           27.6 kB"""
    )
    baseline = dataclasses.replace(shape.sffn, backend=Backend.MEGATRON)
    megatron_table = accounting.table(
        dataclasses.replace(shape, sffn=baseline), ParallelLayout(ep=4)
    )
    assert "sent" not in megatron_table and "Megatron's alltoall" in megatron_table
    shared = accounting.table(
        dataclasses.replace(shape, sffn=dataclasses.replace(shape.sffn, shared_blocks=2))
    )
    assert shared.startswith(
        "sparse feed-forward: avg-k, 62 of 1024 blocks of 64 cells and 2 shared (E = 16) in 4 of 24"
    )
    one_table = dataclasses.replace(shape.sffn, layers_per_table=4)
    assert "4 of 24 layers, one table for 4 of them\n" in accounting.table(
        dataclasses.replace(shape, sffn=one_table)
    )
    assert "sent" not in accounting.table(shape)
    assert "sent" not in accounting.table(shape, ParallelLayout())
    dense = accounting.table(accounting.dense_equivalent(shape), ParallelLayout(ep=4))
    assert dense.splitlines() == [
        "feed-forward: dense, 4096 cells in 24 layers",
        "  parameters                  353.8 M",
        "  active parameters           353.8 M",
        "  FLOPs per token, forward    908.2 M",
        "  FLOPs over dense               +0 %",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.0 k"), (12_345_678, "12.3 M"), (2.5e15, "2500.0 T")],
)
def test_numbers_have_one_decimal_and_a_prefix(number: float, text: str) -> None:
    assert accounting.human(number) == text
