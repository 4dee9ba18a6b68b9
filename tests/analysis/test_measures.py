"""Numbers of a recording against plain loops, and at their ends."""

from __future__ import annotations

import numpy
import pytest

from megatron_sffn.analysis import measures

T, K, B = 300, 5, 13


def blocks(seed: int = 0, *, num_blocks: int = B, tokens: int = T) -> numpy.ndarray:
    """`[T, K]` distinct blocks, some places empty."""
    random = numpy.random.default_rng(seed)
    rows = [random.permutation(num_blocks)[:K] for _ in range(tokens)]
    found = numpy.sort(numpy.array(rows), axis=1)
    found[random.random(found.shape) < 0.1] = -1
    return numpy.sort(found, axis=1).astype(numpy.int32)


def sets(rows: numpy.ndarray) -> list[set[int]]:
    return [set(row.tolist()) - {-1} for row in rows]


def test_load_counts_no_empty_places() -> None:
    rows = blocks()
    load = measures.load_of(rows, B)
    assert load.tolist() == [sum(block in each for each in sets(rows)) for block in range(B)]
    assert measures.load_of(rows[:0], B).tolist() == [0] * B


def test_most_used_are_alive_and_in_falling_order() -> None:
    load = numpy.array([3, 0, 9, 3, 1])
    assert measures.most_used(load, 3).tolist() == [2, 0, 3]
    assert measures.most_used(load, 99).tolist() == [2, 0, 3, 4]


def test_coactivation_is_relative_to_chance() -> None:
    rows, chosen = blocks(), numpy.array([4, 0, 12])
    found, tokens = measures.coactivation(rows, chosen, B), sets(rows)
    for i, one in enumerate(chosen):
        for j, other in enumerate(chosen):
            if i == j:
                assert numpy.isnan(found[i, j])
                continue
            both = sum({one, other} <= each for each in tokens)
            loads = [sum(block in each for each in tokens) for block in (one, other)]
            assert found[i, j] == pytest.approx(both * T / (loads[0] * loads[1]))


def test_blocks_that_always_meet_and_blocks_that_never_do() -> None:
    rows = numpy.array([[0, 1], [2, 3]] * 50)
    found = measures.coactivation(rows, numpy.arange(4), 4)
    assert found[0, 1] == found[2, 3] == 2
    assert found[0, 2] == found[1, 3] == 0
    mixed = numpy.array([0, 2, 1, 3])
    order = mixed[measures.alike_together(found[mixed][:, mixed])].tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 1}), frozenset({2, 3})}


def test_a_token_with_a_block_in_two_heads_has_it_once() -> None:
    rows = numpy.array([[0, 0, 1], [1, 1, 1]])
    assert measures.members(rows, numpy.array([0, 1]), 2).tolist() == [[True, True], [False, True]]
    assert measures.kept(rows, rows, 2) == 1
    assert measures.kept_by_chance(rows, rows, 2) == pytest.approx((1 * 1 + 2 * 2) / (3 * 2))


def test_token_counts_and_their_overlap() -> None:
    rows, ids = blocks(), numpy.random.default_rng(1).integers(100, 107, T)
    chosen = numpy.array([7, 2, 3])
    counts, tokens = measures.token_counts(rows, ids, chosen, B), sets(rows)
    known = sorted(set(ids.tolist()))
    for row, block in zip(counts, chosen, strict=True):
        expected = [
            sum(block in each and given == one for each, given in zip(tokens, ids, strict=True))
            for one in known
        ]
        assert row.tolist() == expected
    found = measures.overlap(counts)
    shares = counts / counts.sum(axis=1, keepdims=True)
    least, most = numpy.minimum(shares[0], shares[2]), numpy.maximum(shares[0], shares[2])
    assert found[0, 2] == pytest.approx(least.sum() / most.sum())
    assert found[2, 0] == pytest.approx(found[0, 2])


def test_overlap_at_its_ends() -> None:
    found = measures.overlap(numpy.array([[4.0, 4, 0, 0], [1, 1, 0, 0], [0, 0, 2, 5]]))
    assert found[0, 1] == 1
    assert found[0, 2] == 0
    assert measures.mean_of_pairs(found) == pytest.approx(1 / 3)
    assert measures.mean_of_pairs(numpy.full((1, 1), numpy.nan)) is None


@pytest.mark.parametrize("chunk", [7, 1024])
def test_drift(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(measures, "CHUNK", chunk)
    before, after = blocks(0), blocks(1)
    pairs = list(zip(sets(before), sets(after), strict=True))
    both, former = sum(len(a & b) for a, b in pairs), sum(len(a) for a, _ in pairs)
    assert measures.kept(before, after, B) == pytest.approx(both / former)
    assert measures.kept(before, before, B) == 1
    assert measures.kept(before, numpy.full_like(before, -1), B) == 0


def test_drift_of_independent_choices_is_that_of_chance() -> None:
    before, after = blocks(0, tokens=3000), blocks(1, tokens=3000)
    chance = measures.kept_by_chance(before, after, B)
    assert measures.kept(before, after, B) == pytest.approx(chance, abs=0.02)


def test_tens_of_thousands_of_blocks() -> None:
    many = 65536
    rows = blocks(0, num_blocks=many, tokens=1100)
    chosen = measures.most_used(measures.load_of(rows, many), 64)
    assert measures.coactivation(rows, chosen, many).shape == (64, 64)
    assert measures.kept(rows, rows, many) == 1
