"""Orderings, learning rates, gaps and speedups of studies with known losses and spread."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_sffn.study.reporting.figures import pareto
from megatron_sffn.study.reporting.findings import Findings, find
from megatron_sffn.study.reporting.orderings import holm
from megatron_sffn.study.reporting.results import read_results
from megatron_sffn.study.reporting.spread import p_value, spreads
from tests.support import studies

Find = Callable[..., Findings]


@pytest.fixture
def found(tmp_path: Path) -> Find:
    """`found(rows)` are the findings of a study."""

    def findings(rows: list[dict[str, Any]]) -> Findings:
        return find(read_results([studies.write(tmp_path, rows)]))

    return findings


def names(findings: Findings, kind: str) -> set[tuple[str, str]]:
    return {(item.better.name, item.worse.name) for item in getattr(findings, kind)}


def test_differences_far_beyond_the_spread_hold(found: Find) -> None:
    findings = found(studies.rows(widths=[128], spread=0.001))
    holding = names(findings, "holding")
    assert ("avg-k-g32-d128", "dense-d128") in holding
    assert ("avg-k-g32-d128", "avg-k-g8-d128") in holding
    assert ("hash-g128-d128", "hash-g512-d128") in holding
    assert not findings.untested and findings.gaps == ()
    difference = next(i for i in findings.holding if i.worse.name == "dense-d128").difference
    assert difference == pytest.approx(0.15, abs=0.003)


def test_differences_within_the_spread_do_not_hold(found: Find) -> None:
    rows = studies.rows(widths=[128], spread=0.0)
    for row in rows:
        row["validation_loss_tail"] += {1: -0.5, 2: 0.0, 3: 0.5}[row["seed"]]
    findings = found(rows)
    assert not findings.holding and findings.open
    assert all((item.p_value or 0) >= 0.05 for item in findings.open)


def test_a_sparse_point_meets_dense_its_neighbours_and_other_series_at_its_g(found: Find) -> None:
    findings = found(studies.rows(widths=[128]))
    pairs = [{item.better.name, item.worse.name} for item in findings.orderings]
    assert len(pairs) == 8 + 2 * 3 + 4
    assert {"avg-k-g8-d128", "hash-g8-d128"} in pairs
    assert {"avg-k-g8-d128", "avg-k-g128-d128"} not in pairs
    assert {"avg-k-g8-d128", "hash-g32-d128"} not in pairs


def test_a_single_seed_is_told_and_nothing_holds(found: Find) -> None:
    findings = found(studies.rows(widths=[128], seeds=[1]))
    assert not findings.holding and not findings.open and len(findings.untested) == 18
    assert findings.points[0].spread is None
    assert any("A second seed" in gap and "avg-k-g8-d128" in gap for gap in findings.gaps)


def test_equal_losses_of_all_seeds_give_no_warning(found: Find) -> None:
    rows = studies.rows(widths=[128], spread=0.0)
    for row in rows:
        row |= {"validation_loss": 3.0, "validation_loss_tail": 3.0}
    assert not found(rows).holding


def test_settings_that_were_not_run_are_named(found: Find) -> None:
    rows = [row for row in studies.rows() if row["point"] != "hash-g8-d256"]
    rows = [row for row in rows if row["seed"] != 2 or row["point"] != "avg-k-g8-d128"]
    findings = found([row for row in rows if row["point"] != "dense-d256"])
    text = "\n".join(findings.gaps)
    assert "No dense model of the same size and tokens as avg-k-g8-d256" in text
    assert "Block sizes that other series have: hash at g 8, d 256." in text
    assert "avg-k-g8-d128 lacks 2" in text


def test_settings_are_compared_at_their_best_learning_rate(found: Find) -> None:
    findings = found(studies.rows(widths=[128], spread=0.0))
    assert {point.lr for point in findings.points} == {1e-3}
    for valley in findings.valleys:
        assert valley.optimum is not None and not valley.at_edge
        assert valley.optimum[0] == pytest.approx(1e-3, rel=0.01)
        assert valley.optimum[1] == pytest.approx(min(valley.losses), abs=1e-5)


def test_a_best_rate_at_the_edge_and_a_short_ladder_are_told(found: Find) -> None:
    findings = found(studies.rows(widths=[128], rates=[1e-3, 2e-3, 4e-3], spread=0.0))
    assert all(valley.at_edge and valley.optimum is None for valley in findings.valleys)
    assert "dense-d128 at 0.001 (the lowest)" in "\n".join(findings.gaps)
    short = found(studies.rows(widths=[128], rates=[1e-3, 2e-3], spread=0.0))
    assert "A ladder of 3 learning rates: avg-k-g8-d128" in "\n".join(short.gaps)


def test_runs_of_a_ladder_give_the_rates_and_are_compared_with_nothing(found: Find) -> None:
    rungs = studies.rows(widths=[128], seeds=[1], spread=0.0)
    for row in rungs:
        row |= {"rate_source": "ladder", "tokens": row["tokens"] // 2, "validation_loss_tail": 1.0}
    seeds = studies.rows(widths=[128], rates=[1.1e-3])
    findings = found(rungs + [{**row, "rate_source": "fitted"} for row in seeds])
    assert len(findings.points) == len(findings.valleys) == 9 and len(findings.sizes) == 1
    assert all(point.lr == 1.1e-3 and point.loss > 2 for point in findings.points)
    assert all(len(valley.rates) == 3 for valley in findings.valleys)
    assert len(found(rungs).points) == 9  # ladders alone are a study, too
    without = [row for row in seeds if row["point"] != "dense-d128"]
    gap = "Runs at the best rate of the ladder: dense-d128."
    assert gap in found(rungs + [{**row, "rate_source": "fitted"} for row in without]).gaps


def test_a_transferred_rate_needs_no_ladder(found: Find) -> None:
    rows = studies.rows(widths=[128], rates=[1e-3])
    assert "A ladder of 3 learning rates" in "\n".join(found(rows).gaps)
    assert not found([{**row, "rate_source": "transferred"} for row in rows]).gaps


def test_a_flag_that_the_study_varies_makes_series(found: Find) -> None:
    rows = studies.rows(widths=[128])
    other = [
        {**row, "run": f"{row['run']}-2", "point": f"{row['point']}-2", "sffn_layers": "2"}
        for row in rows
        if row["router"] == "hash"
    ]
    findings = found([{**row, "sffn_layers": "all"} for row in rows] + other)
    labels = [label for label, _ in findings.lines()]
    assert labels == ["avg-k, sffn_layers all", "hash, sffn_layers 2", "hash, sffn_layers all"]
    assert findings.results.flags == ("sffn_layers",)


def test_active_cells_that_a_study_varies_make_series_and_those_of_a_size_do_not(
    found: Find,
) -> None:
    rows = studies.rows()
    assert {label.split(",")[0] for label, _ in found(rows).lines()} == set(studies.ROUTERS)
    assert len({point.series for point in found(rows).points}) == 3
    wide = [
        {**row, "run": f"{row['run']}-k", "point": f"{row['point']}-k", "active_cells": 1024}
        for row in rows
        if row["router"] == "hash" and row["hidden_size"] == 128
    ]
    series = {point.series for point in found(rows + wide).points}
    assert {"hash, k 4 d", "hash, k 8 d", "avg-k, k 4 d", "dense"} == series


def test_dense_has_a_speedup_of_1_and_three_sizes_fix_its_law(found: Find) -> None:
    findings = found(studies.rows(widths=[128, 256, 512], spread=0.0))
    assert "3 budgets of this study" in findings.law.source
    for gain in findings.gains:
        if gain.point.router == "dense":
            assert gain.mean.time == pytest.approx(1) and gain.mean.compute == pytest.approx(1)
    best = next(gain for gain in findings.gains if gain.point.name == "avg-k-g32-d256")
    assert best.mean.time is not None
    # g = 32 takes 1.2 + 4/32 times the seconds of the dense model at equal FLOPs.
    assert best.mean.time == pytest.approx(best.mean.compute / 1.325)


def test_a_surface_that_does_not_describe_the_losses_is_told(found: Find) -> None:
    remarks = "\n".join(found(studies.rows(rates=[1e-3])).remarks)
    assert "avg-k: loss falls with the compute by an exponent of" in remarks
    assert "this form does not describe the losses, with an asymptote of 0" in remarks


def test_chance_holds_as_rarely_as_the_level_says_and_five_deviations_hold() -> None:
    generator = numpy.random.default_rng(3)
    by_chance, seen = 0, 0
    for _ in range(100):
        losses = generator.normal(3.0, 0.01, (8, 3))
        losses[0] -= 0.05
        pairs = list(combinations(spreads(losses.tolist()), 2))
        corrected = holm([p_value(first, second) for first, second in pairs])
        holds = [p < 0.05 for p in corrected]
        seen += all(holds[:7])
        by_chance += any(holds[7:])
    assert by_chance <= 10 and seen >= 70


def test_a_variance_shrinks_towards_those_of_the_others() -> None:
    lucky, *others = spreads([[3.0, 3.01, 3.02], *([3.0, 3.1, 3.2],) * 7, [3.0]])
    assert others[-1] is None and lucky.variance > 2e-3 and others[0].variance < 0.01 + 1e-9
    assert lucky.freedom <= 16  # two for each of eight settings
    (alone,) = spreads([[3.0, 3.1, 3.2]])
    assert alone.variance == pytest.approx(0.01) and alone.freedom == 2


def test_holm_multiplies_the_smallest_by_the_number_and_keeps_the_order() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_front_has_what_no_other_point_dominates() -> None:
    assert pareto([(3, 1), (1, 3), (2, 3), (2, 2), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]
