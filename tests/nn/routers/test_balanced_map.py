"""Balanced maps of RandHash (methods R1-R4, with `--sffn-hash-balance`)."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import balanced_map as module
from megatron_sffn.nn.routers.balanced_map import balanced_map, num_candidates
from megatron_sffn.nn.routers.rand_hash import RandHashConfig
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.hashing import hashed_subsets
from tests.nn.routers.conftest import D, transformer
from tests.support.paths import ROOT

SIZES = [(16, 1), (64, 1), (16, 2), (8, 4), (64, 4), (256, 16), (32, 16)]
BALANCED = RandHashConfig(balance="text")
ROWS = 100
COUNTS = 1000 // torch.arange(1, 91)
"""Counts of 90 ids by Zipf's law; the embedding has `ROWS` rows."""


@pytest.fixture(scope="module")
def counts() -> Tensor:
    """How often each word of the documentation occurs, and 50 ids that do not occur."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    words = Counter(re.findall(r"\w+|[^\w\s]", text))
    return torch.tensor([*words.values(), *[0] * 50])


def shares(blocks_VK: Tensor, counts: Tensor, num_blocks: int) -> Tensor:
    """Load of every block `[B]` over the mean load."""
    loads = torch.zeros(num_blocks, dtype=torch.float64)
    for blocks_V in blocks_VK.T:
        loads.index_add_(0, blocks_V.long(), counts.double())
    return loads / loads.mean()


@pytest.mark.parametrize(("num_blocks", "num_active"), SIZES)
def test_the_load_of_real_text_is_as_even_as_its_most_frequent_word_allows(
    counts: Tensor, num_blocks: int, num_active: int
) -> None:
    balanced = balanced_map(counts, num_blocks=num_blocks, num_active=num_active, key=43)
    uniform = hashed_subsets(torch.arange(len(counts)), size=num_blocks, count=num_active, key=43)
    loads, uniform_loads = (shares(m, counts, num_blocks) for m in (balanced, uniform))
    # A block has at least the load of a word that chooses it.
    least_maximum = max(1.0, float(counts.max() / counts.sum()) * num_blocks / num_active)
    assert loads.max() < 1.01 * least_maximum
    assert loads.std() < 0.9 * uniform_loads.std()
    assert loads.max() < uniform_loads.max() and loads.min() > uniform_loads.min()


@pytest.mark.parametrize(("num_blocks", "num_active"), [*SIZES, (1, 1), (2, 1), (3, 2), (5, 5)])
def test_r2_every_id_has_distinct_blocks_in_range(
    counts: Tensor, num_blocks: int, num_active: int
) -> None:
    blocks_VK = balanced_map(counts, num_blocks=num_blocks, num_active=num_active, key=1)
    assert blocks_VK.shape == (len(counts), num_active)
    assert blocks_VK.min() >= 0 and blocks_VK.max() < num_blocks
    assert (blocks_VK.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("num_blocks", "num_active"), [(64, 4), (256, 16), (32, 16)])
def test_ids_share_no_fixed_sets_of_blocks(
    counts: Tensor, num_blocks: int, num_active: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distinct_sets() -> int:
        chosen = balanced_map(counts, num_blocks=num_blocks, num_active=num_active, key=1)
        return len(chosen.unique(dim=0))

    assert distinct_sets() > 0.8 * len(counts)
    # With the emptiest of all blocks, as with one block per id in the paper, there are B/K sets.
    monkeypatch.setattr(module, "num_candidates", lambda num_blocks, num_active: num_blocks)
    assert distinct_sets() == num_blocks // num_active


def test_candidates_are_at_least_the_blocks_and_leave_a_choice() -> None:
    for num_blocks in range(1, 200):
        for num_active in range(1, num_blocks + 1):
            candidates = num_candidates(num_blocks, num_active)
            assert min(num_active + 1, num_blocks) <= candidates <= num_blocks


def test_ids_that_do_not_occur_spread_evenly() -> None:
    counts = torch.zeros(1600, dtype=torch.int64)
    blocks_VK = balanced_map(counts, num_blocks=32, num_active=2, key=1)
    ids_of_block = torch.bincount(blocks_VK.flatten().long(), minlength=32)
    assert (ids_of_block - 100).abs().max() <= 1


def test_the_size_of_a_chunk_does_not_change_the_map(
    counts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = balanced_map(counts, num_blocks=64, num_active=4, key=1)
    monkeypatch.setattr(module, "HASHED_CANDIDATES", 100)
    assert torch.equal(balanced_map(counts, num_blocks=64, num_active=4, key=1), expected)


def blocks_of(router: SparseFFN, ids: Tensor) -> Tensor:
    """The blocks of ids `[N]`, whatever their tokens are."""
    x, keys = torch.randn(len(ids), D).double(), torch.zeros(12, 2, D).double()
    chosen: Tensor = router(x, keys, ids).block_ids
    return chosen


def test_r1_and_r4_an_id_has_the_blocks_of_the_map_in_every_mode(build) -> None:
    router = build(BALANCED, padded_vocab_size=ROWS)
    router.balance_map(COUNTS)
    ids = torch.tensor([7, 3, 7, 99, 3, 7])
    chosen = blocks_of(router, ids)
    expected = balanced_map(
        torch.cat([COUNTS, torch.zeros(10, dtype=torch.int64)]),
        num_blocks=12,
        num_active=4,
        key=42 * 1_000_003 + 1,
    )
    assert torch.equal(chosen, expected[ids].long())
    assert torch.equal(blocks_of(router.eval(), ids), chosen)
    ids[1] = 98
    differs = (blocks_of(router, ids) != chosen).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [1]


def test_r3_a_checkpoint_has_the_map_and_restores_it(one_rank: None) -> None:
    config = transformer(BALANCED, padded_vocab_size=ROWS)
    layers = [SparseFFN(config, layer_number=1) for _ in range(2)]
    layers[0].router.balance_map(COUNTS)
    state = layers[0].state_dict()
    assert set(state) == {"experts.keys", "experts.values", "router.map"}
    assert not [*layers[0].router.parameters()]
    ids = torch.arange(ROWS)
    expected = blocks_of(layers[0].router, ids)
    assert not torch.equal(blocks_of(layers[1].router, ids), expected)
    layers[1].load_state_dict(state)
    layers[1].set_layer_number(1)
    assert torch.equal(blocks_of(layers[1].router, ids), expected)


def test_without_counts_the_map_is_the_uniform_one(build) -> None:
    ids = torch.arange(ROWS)
    uniform = blocks_of(build(RandHashConfig()), ids)
    assert torch.equal(blocks_of(build(BALANCED, padded_vocab_size=ROWS), ids), uniform)


def test_layers_and_seeds_have_different_maps_unless_shared(build) -> None:
    ids = torch.arange(ROWS)

    def chosen(layer: int, **options: object) -> Tensor:
        config = RandHashConfig(balance="text", **options)
        router = build(config, padded_vocab_size=ROWS)
        router.set_layer_number(layer)
        router.balance_map(COUNTS)
        return blocks_of(router, ids)

    assert not torch.equal(chosen(1), chosen(2))
    assert not torch.equal(chosen(1), chosen(1, seed=7))
    assert torch.equal(chosen(1, shared=True), chosen(2, shared=True))


def test_unknown_and_large_vocabularies_are_refused(build) -> None:
    with pytest.raises(ConfigError, match="needs the number of token ids"):
        build(BALANCED)
    with pytest.raises(ConfigError, match=r"text makes a table of 33554432 ids with 4 blocks"):
        transformer(BALANCED, padded_vocab_size=2**25)
    transformer(RandHashConfig(), padded_vocab_size=2**25)


def test_a_map_of_n_grams_cannot_be_balanced() -> None:
    with pytest.raises(ConfigError, match="--sffn-hash-ngram 2 has no table of all n-grams"):
        transformer(RandHashConfig(balance="text", ngram=2))
