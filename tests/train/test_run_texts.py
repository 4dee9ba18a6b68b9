"""The line that names the layers of a run."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.train.run_texts import layers_line, ranges

AVG_K, RAND_HASH = ROUTERS["avg-k"](), ROUTERS["rand-hash"]()
SFFN = SparseFFNConfig(router=AVG_K, active_cells=8, block_size=2, expansion=2)


def test_the_line_of_layers_counts_and_numbers_the_layers_of_each_router() -> None:
    sffn = SparseFFNConfig(
        router=AVG_K,
        active_cells=8,
        block_size=2,
        expansion=2,
        other_routers=((0, RAND_HASH), (2, RAND_HASH)),
    )
    args = Namespace(
        hybrid_layer_pattern=None, moe_layer_freq=[0, 0, 1, 1, 1, 1], mtp_num_layers=2, num_layers=6
    )
    assert layers_line(args, sffn) == (
        "layers, from 0: 6 = 2 dense (0-1) + 2 rand-hash (2, 4) + 2 avg-k (3, 5); "
        "2 of multi-token prediction"
    )
    args.mtp_num_layers = None
    assert layers_line(args, None) == "layers, from 0: 6 = 6 dense (0-5)"


def test_the_line_of_layers_names_those_of_a_hybrid_model() -> None:
    args = Namespace(hybrid_layer_pattern="M-|*EME/*E", mtp_num_layers=1)
    assert layers_line(args, SFFN) == (
        "layers, from 0: 6 = 2 Mamba (0, 4) + 1 dense (1) + 1 attention (2) + 2 avg-k (3, 5); "
        "1 of multi-token prediction"
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([0, 1, 2, 5], "0-2, 5"),
        ([1, 3, 5, 7, 9], "1, 3, ..., 9"),
        ([5, 11, 17], "5, 11, 17"),
        ([0, 2, 4, 7], "0, 2, 4, 7"),
    ],
)
def test_numbers_of_layers_are_written_in_short(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
