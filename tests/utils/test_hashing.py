"""Choices that follow from names: fixed for ever, even, and the same on every device."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_sffn.utils.hashing import hashed_subsets, ngram_keys, seed_of


def test_seeds_are_fixed_for_ever() -> None:
    # A change of these numbers changes the initial weights of every model.
    assert seed_of(1234, 1, "router", "weight") == 1509138527
    assert seed_of(1234, 1) == 4291818746


def test_different_names_have_different_seeds_of_32_bits() -> None:
    names = list(itertools.product(range(50), range(50), ("router", "subset")))
    seeds = {seed_of(*name) for name in names}
    assert len(seeds) >= len(names) - 1
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert seed_of("1", 23) == seed_of(1, "23")


def test_subsets_are_fixed_for_ever() -> None:
    subsets = hashed_subsets(torch.tensor([0, 1, 50256]), size=256, count=4, key=42)
    assert subsets.tolist() == [[98, 133, 146, 242], [145, 200, 204, 213], [43, 128, 213, 231]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 65_536, 65_537])
def test_subsets_are_distinct_and_in_range(size: int) -> None:
    for count in {1, min(size, 7), min(size, 64)}:
        subsets = hashed_subsets(torch.arange(200), size=size, count=count, key=7)
        assert subsets.shape == (200, count) and subsets.dtype == torch.long
        assert (subsets.diff(dim=1) > 0).all(), "ascending, hence distinct"
        assert subsets.min() >= 0 and subsets.max() < size


@pytest.mark.parametrize("size", [1, 2, 7, 16, 100])
def test_a_subset_of_full_size_holds_every_number(size: int) -> None:
    subsets = hashed_subsets(torch.arange(20), size=size, count=size, key=3)
    assert (subsets == torch.arange(size)).all()


def test_the_subset_of_a_name_does_not_depend_on_other_names() -> None:
    names = torch.tensor([5, 2**40, 7, 0])
    together = hashed_subsets(names, size=50, count=5, key=1)
    for index, name in enumerate(names):
        alone = hashed_subsets(name[None], size=50, count=5, key=1)
        assert torch.equal(alone[0], together[index])
    assert hashed_subsets(names[:0], size=50, count=5, key=1).shape == (0, 5)


def chi_square(counts: torch.Tensor, expected: float, variance: float) -> float:
    """The chi-square statistic of counts, in standard deviations from its own mean."""
    statistic = float(((counts.double() - expected) ** 2).sum() / variance)
    return (statistic - len(counts)) / (2 * len(counts)) ** 0.5


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (2, 1),
        (3, 1),
        (8, 1),
        (4, 2),
        (8, 2),
        (12, 2),
        (16, 2),
        (65, 1),
        (100, 4),
        (256, 4),
        (500, 10),
    ],
)
def test_all_numbers_and_all_pairs_are_equally_frequent(size: int, count: int) -> None:
    names = 20_000
    subsets = hashed_subsets(torch.arange(names), size=size, count=count, key=42_000_127)
    counts = torch.bincount(subsets.flatten(), minlength=size)
    share = count / size
    # The counts sum to a constant: with the variance of free ones, the statistic is a bit larger.
    variance = names * share * (1 - share) * size / (size - 1)
    assert chi_square(counts, names * share, variance) < 5
    if count == 1:
        return
    share = count * (count - 1) / (size * (size - 1))
    membership = torch.zeros(names, size).scatter(1, subsets, 1.0)
    pair_counts = (membership.T @ membership)[torch.ones(size, size).triu(1).bool()]
    assert chi_square(pair_counts, names * share, names * share * (1 - share)) < 5


def test_keys_and_neighbouring_names_make_independent_maps() -> None:
    names, size = 20_000, 16
    first, second = (
        hashed_subsets(torch.arange(names), size=size, count=1, key=key)[:, 0] for key in (1, 2)
    )
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:-16], first[16:])):
        matches = (a == b).sum().item()
        expected = len(a) / size
        assert abs(matches - expected) < 5 * expected**0.5, matches


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_n_grams_have_equal_numbers_if_and_only_if_their_ids_are_equal(length: int) -> None:
    ids_bs = torch.randint(3, (40, 7), generator=torch.Generator().manual_seed(1))
    keys = ngram_keys(ids_bs, length)
    names: dict[tuple[int, ...], int] = {}
    for row, row_keys in zip(ids_bs.tolist(), keys.tolist(), strict=True):
        padded = [-1] * (length - 1) + row
        for position, key in enumerate(row_keys):
            assert names.setdefault(tuple(padded[position : position + length]), key) == key
    assert len(set(names.values())) == len(names)
    assert keys.min() >= 0 and keys.max() < 2**32


def test_the_order_of_ids_matters_to_n_grams() -> None:
    keys = ngram_keys(torch.tensor([[1, 2, 5], [2, 1, 5]]), 3)
    assert keys[0, 2] != keys[1, 2]


def test_a_vocabulary_of_pairs_has_few_collisions() -> None:
    first, second = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    keys = ngram_keys(torch.stack([first.flatten(), second.flatten()], dim=1), 2)[:, 1]
    # 90,000 random numbers of 32 bits have 0.9 collisions on average.
    assert len(keys.unique()) > 90_000 - 10
