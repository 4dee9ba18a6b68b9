"""RandHash (methods R1-R4)."""

import pytest
import torch

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import rand_hash
from megatron_sffn.nn.routers.rand_hash import RandHashConfig
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.hashing import hashed_subsets
from tests.nn.routers.conftest import D, transformer

VOCAB = 5000


def every_id(num_blocks: int = 48, num_active: int = 6, key: int = 42) -> torch.Tensor:
    return hashed_subsets(torch.arange(VOCAB), size=num_blocks, count=num_active, key=key)


def test_r1_an_id_has_the_same_blocks_at_every_position_and_in_every_mode(build) -> None:
    router = build(RandHashConfig())
    ids = torch.tensor([7, 3, 7, 4999, 3, 7])
    x, keys = torch.randn(6, D).double(), torch.randn(12, 2, D).double()
    routing = router(x, keys, ids)
    assert torch.equal(routing.block_ids[0], routing.block_ids[2])
    assert torch.equal(routing.block_ids[1], routing.block_ids[4])
    router.eval()
    assert torch.equal(router(x, keys, ids).block_ids, routing.block_ids)
    second_router = build(RandHashConfig())
    assert torch.equal(second_router(torch.zeros_like(x), keys, ids).block_ids, routing.block_ids)


@pytest.mark.parametrize(
    ("num_blocks", "num_active"), [(1, 1), (2, 1), (3, 3), (48, 6), (256, 16), (1000, 7)]
)
def test_r2_every_id_has_distinct_blocks_in_range(num_blocks: int, num_active: int) -> None:
    ids = every_id(num_blocks, num_active)
    assert ids.shape == (VOCAB, num_active)
    assert ids.min() >= 0
    assert ids.max() < num_blocks
    assert (ids.diff(dim=1) > 0).all()


def test_r2_the_map_is_even() -> None:
    counts = torch.bincount(every_id().flatten(), minlength=48)
    expected = VOCAB * 6 / 48
    # Sampling without replacement: the standard deviation is below that of a binomial, 23.4.
    assert ((counts - expected).abs() < 5 * 23.4).all()
    pairs = torch.zeros(48, 48)
    ids = every_id()
    for a in range(6):
        for b in range(6):
            pairs.index_put_((ids[:, a], ids[:, b]), torch.ones(VOCAB), accumulate=True)
    pair_counts = pairs[~torch.eye(48, dtype=torch.bool)]
    # Two blocks meet in 5000·6·5/(48·47) = 66 ids; a structured map would leave gaps.
    assert pair_counts.min() > 66 - 6 * 8.2
    assert pair_counts.max() < 66 + 6 * 8.2


def test_r3_the_router_has_no_parameter_and_no_gate(one_rank: None) -> None:
    layer = SparseFFN(transformer(RandHashConfig()), layer_number=1)
    assert set(layer.state_dict()) == {"experts.keys", "experts.values"}
    ids = torch.tensor([1, 2])
    routing = layer.router(torch.zeros(2, D).double(), layer.experts.keys, ids)
    assert routing.gates is None


def test_r4_only_the_current_id_matters(one_rank: None) -> None:
    layer = SparseFFN(transformer(RandHashConfig()), layer_number=1)
    hidden = torch.randn(5, 2, D).double()
    ids = torch.randint(VOCAB, (2, 5))
    chosen = []
    layer.trained.register_forward_pre_hook(lambda module, args: chosen.append(args[0].block_ids))
    for changed in (None, 3):
        if changed is not None:
            ids = ids.clone()
            ids[1, changed] += 1
        layer(hidden, padding_mask=ids)
    differs = (chosen[0] != chosen[1]).any(dim=1)
    # Token (sequence 1, position 3) is row 3·2 + 1 of the sequence-first hidden states.
    assert differs.nonzero().flatten().tolist() == [3 * 2 + 1]


def test_layers_have_different_maps_unless_shared(build) -> None:
    ids, x, keys = torch.arange(100), torch.zeros(100, D).double(), torch.zeros(12, 2, D).double()
    for shared in (False, True):
        routers = [build(RandHashConfig(shared=shared)) for _ in range(2)]
        routers[1].set_layer_number(2)
        first, second = (router(x, keys, ids).block_ids for router in routers)
        assert torch.equal(first, second) is shared


def test_different_seeds_give_different_maps(build) -> None:
    ids, x, keys = torch.arange(100), torch.zeros(100, D).double(), torch.zeros(12, 2, D).double()
    first, second = (build(RandHashConfig(seed=s))(x, keys, ids).block_ids for s in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("largest", "makes_table"), [(2**28, True), (100 * 4 * 2, True), (799, False)]
)
def test_a_table_of_the_vocabulary_is_the_map(
    build, monkeypatch: pytest.MonkeyPatch, largest: int, makes_table: bool
) -> None:
    monkeypatch.setattr(rand_hash, "LARGEST_TABLE", largest)
    monkeypatch.setattr(rand_hash, "HASHED_IDS", 30)
    ids, x, keys = torch.arange(99, -1, -3), torch.zeros(34, D).double(), torch.zeros(12, 2, D)
    expected = build(RandHashConfig())(x, keys, ids).block_ids
    router = build(RandHashConfig(), padded_vocab_size=100)
    for _ in range(2):
        actual = router(x, keys, ids).block_ids
        assert torch.equal(actual, expected) and actual.dtype == torch.int64
    assert (router._table is not None) is makes_table
    assert not router.state_dict()
    router.set_layer_number(2)
    assert not torch.equal(router(x, keys, ids).block_ids, expected)


def test_without_ids_the_message_says_what_to_call(build) -> None:
    with pytest.raises(AssertionError, match="give them to the layer"):
        build(RandHashConfig())(torch.zeros(1, D), torch.zeros(12, 2, D), None)


def test_r4_an_n_gram_is_the_last_ids_alone(one_rank: None) -> None:
    layer = SparseFFN(transformer(RandHashConfig(ngram=3), padded_vocab_size=VOCAB), layer_number=1)
    hidden = torch.randn(7, 2, D).double()
    ids = torch.randint(VOCAB, (2, 7))
    changed = ids.clone()
    changed[1, 2] += 1
    chosen = []
    layer.trained.register_forward_pre_hook(lambda module, args: chosen.append(args[0].block_ids))
    for ids_bs in (ids, changed):
        layer(hidden, padding_mask=layer.config.sffn.router.token_keys(ids_bs))
    assert (chosen[0].sort().values.diff(dim=1) > 0).all()
    differs = (chosen[0] != chosen[1]).any(dim=1).view(7, 2)
    assert differs.nonzero().tolist() == [[2, 1], [3, 1], [4, 1]]


def test_n_grams_of_cut_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match="--sffn-hash-ngram 2 needs whole sequences"):
        transformer(RandHashConfig(ngram=2), context_parallel_size=2)
    with pytest.raises(ConfigError, match="--sffn-hash-ngram 0 is out of range"):
        RandHashConfig(ngram=0)
