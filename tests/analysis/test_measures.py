"""Measures of a recording equal plain loops, and have the right extreme values."""

from __future__ import annotations

import numpy
import pytest

from megatron_sffn.analysis import measures

T, K, B = 300, 5, 13


def random_blocks(seed: int = 0, *, num_blocks: int = B, num_tokens: int = T) -> numpy.ndarray:
    """`[T, K]` distinct blocks per token, with some places empty."""
    random = numpy.random.default_rng(seed)
    rows = [random.permutation(num_blocks)[:K] for _ in range(num_tokens)]
    blocks = numpy.sort(numpy.array(rows), axis=1)
    blocks[random.random(blocks.shape) < 0.1] = -1
    return numpy.sort(blocks, axis=1).astype(numpy.int32)


def sets_of_blocks(rows: numpy.ndarray) -> list[set[int]]:
    return [set(row.tolist()) - {-1} for row in rows]


def test_the_load_does_not_count_empty_places() -> None:
    rows = random_blocks()
    load = measures.load_of(rows, B)
    assert load.tolist() == [
        sum(block in token_blocks for token_blocks in sets_of_blocks(rows)) for block in range(B)
    ]
    assert measures.load_of(rows[:0], B).tolist() == [0] * B


def test_most_used_blocks_are_alive_and_sorted_by_falling_load() -> None:
    load = numpy.array([3, 0, 9, 3, 1])
    assert measures.most_used(load, 3).tolist() == [2, 0, 3]
    assert measures.most_used(load, 99).tolist() == [2, 0, 3, 4]


def test_coactivation_is_relative_to_chance() -> None:
    rows, chosen = random_blocks(), numpy.array([4, 0, 12])
    actual, tokens = measures.coactivation(rows, chosen, B), sets_of_blocks(rows)
    for i, first in enumerate(chosen):
        for j, second in enumerate(chosen):
            if i == j:
                assert numpy.isnan(actual[i, j])
                continue
            num_together = sum({first, second} <= token_blocks for token_blocks in tokens)
            loads = [
                sum(block in token_blocks for token_blocks in tokens) for block in (first, second)
            ]
            assert actual[i, j] == pytest.approx(num_together * T / (loads[0] * loads[1]))


def test_coactivation_separates_blocks_that_are_always_or_never_chosen_together() -> None:
    rows = numpy.array([[0, 1], [2, 3]] * 50)
    actual = measures.coactivation(rows, numpy.arange(4), 4)
    assert actual[0, 1] == actual[2, 3] == 2
    assert actual[0, 2] == actual[1, 3] == 0
    shuffled = numpy.array([0, 2, 1, 3])
    order = shuffled[measures.alike_together(actual[shuffled][:, shuffled])].tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 1}), frozenset({2, 3})}


def test_a_block_in_two_heads_of_a_token_counts_once() -> None:
    rows = numpy.array([[0, 0, 1], [1, 1, 1]])
    assert measures.members(rows, numpy.array([0, 1]), 2).tolist() == [[True, True], [False, True]]
    assert measures.kept(rows, rows, 2) == 1
    assert measures.kept_by_chance(rows, rows, 2) == pytest.approx((1 * 1 + 2 * 2) / (3 * 2))


def test_token_counts_and_overlap_equal_plain_loops() -> None:
    rows, ids = random_blocks(), numpy.random.default_rng(1).integers(100, 107, T)
    chosen = numpy.array([7, 2, 3])
    counts, tokens = measures.token_counts(rows, ids, chosen, B), sets_of_blocks(rows)
    distinct_ids = sorted(set(ids.tolist()))
    for row, block in zip(counts, chosen, strict=True):
        expected = [
            sum(
                block in token_blocks and token_id == known_id
                for token_blocks, token_id in zip(tokens, ids, strict=True)
            )
            for known_id in distinct_ids
        ]
        assert row.tolist() == expected
    actual = measures.overlap(counts)
    shares = counts / counts.sum(axis=1, keepdims=True)
    minima, maxima = numpy.minimum(shares[0], shares[2]), numpy.maximum(shares[0], shares[2])
    assert actual[0, 2] == pytest.approx(minima.sum() / maxima.sum())
    assert actual[2, 0] == pytest.approx(actual[0, 2])


def test_overlap_is_one_for_equal_and_zero_for_disjoint_tokens() -> None:
    actual = measures.overlap(numpy.array([[4.0, 4, 0, 0], [1, 1, 0, 0], [0, 0, 2, 5]]))
    assert actual[0, 1] == 1
    assert actual[0, 2] == 0
    assert measures.mean_of_pairs(actual) == pytest.approx(1 / 3)
    assert measures.mean_of_pairs(numpy.full((1, 1), numpy.nan)) is None


@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_share_of_kept_blocks_equals_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(measures, "CHUNK", chunk)
    before, after = random_blocks(0), random_blocks(1)
    pairs = list(zip(sets_of_blocks(before), sets_of_blocks(after), strict=True))
    num_kept, num_before = sum(len(a & b) for a, b in pairs), sum(len(a) for a, _ in pairs)
    assert measures.kept(before, after, B) == pytest.approx(num_kept / num_before)
    assert measures.kept(before, before, B) == 1
    assert measures.kept(before, numpy.full_like(before, -1), B) == 0


def test_independent_choices_keep_as_many_blocks_as_chance() -> None:
    before, after = random_blocks(0, num_tokens=3000), random_blocks(1, num_tokens=3000)
    chance = measures.kept_by_chance(before, after, B)
    assert measures.kept(before, after, B) == pytest.approx(chance, abs=0.02)


def test_measures_work_with_tens_of_thousands_of_blocks() -> None:
    num_blocks = 65536
    rows = random_blocks(0, num_blocks=num_blocks, num_tokens=1100)
    chosen = measures.most_used(measures.load_of(rows, num_blocks), 64)
    assert measures.coactivation(rows, chosen, num_blocks).shape == (64, 64)
    assert measures.kept(rows, rows, num_blocks) == 1
