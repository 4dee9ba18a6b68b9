"""The page has all its pictures, for few and for many blocks and layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_sffn.analysis.report import Analysis, write
from megatron_sffn.train.routing_trace import RoutingTrace


def make_lines(
    layers: list[int], num_blocks: int, *, evaluated: bool = True
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    random = numpy.random.default_rng(0)
    for iteration in (10, 20, 30):
        for layer in layers:
            common_fields = {
                "iteration": iteration,
                "layer": layer,
                "load_entropy": 0.9,
                "dead_share": 0.0,
            }
            lines.append(common_fields | {"phase": "training", "gate_mean": None, "load_max": 3.0})
            if evaluated:
                tokens = random.poisson(3, num_blocks).tolist()
                lines.append(common_fields | {"phase": "evaluation", "tokens_per_block": tokens})
    return lines


def make_analysis(layers: list[int], num_blocks: int, checkpoints: int, **changes: Any) -> Analysis:
    random = numpy.random.default_rng(1)
    ids = random.integers(0, 40, 200)
    recordings = {
        10 * number: RoutingTrace(
            token_ids=ids,
            blocks={layer: random.integers(-1, num_blocks, (200, 4)) for layer in layers},
            num_blocks=num_blocks,
        )
        for number in range(1, checkpoints + 1)
    }
    values = {
        "run": Path("runs/<b>"),
        "lines": make_lines(layers, num_blocks),
        "recordings": recordings,
        "layers": layers,
        "top": 16,
        "decode": "$t_{}\n日".format,
    }
    return Analysis(**values | changes)


@pytest.mark.parametrize(
    ("layers", "num_blocks", "checkpoints"),
    [([2], 1, 1), ([2, 4], 8, 3), ([1, 2, 3], 300, 2), ([1], 65536, 2)],
    ids=["one block", "few", "many layers", "many blocks"],
)
def test_every_picture_of_the_page_exists(
    tmp_path: Path, layers: list[int], num_blocks: int, checkpoints: int
) -> None:
    page = write(make_analysis(layers, num_blocks, checkpoints), tmp_path, lambda text: None)
    text = page.read_text()
    pictures = set(re.findall(r'src="([^"]+)"', text))
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == 5 + len(layers) + (checkpoints > 1)
    assert "<b>" not in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == [10 * number for number in range(1, checkpoints + 1)]
    assert list(summary["layers"]) == [str(layer) for layer in layers]
    layer_summary = summary["layers"][str(layers[0])]
    assert layer_summary["load_entropy"] == 0.9
    assert ("kept" in layer_summary) == (checkpoints > 1)
    assert "gate_mean" not in layer_summary
    header = (tmp_path / "tokens.csv").read_text().splitlines()[0]
    assert header == "layer,block,load,rank,token_id,text,count,share,ratio"


def test_without_evaluation_the_loads_come_from_the_recordings(tmp_path: Path) -> None:
    analysis = make_analysis([3], 8, 2, lines=make_lines([3], 8, evaluated=False))
    write(analysis, tmp_path, lambda text: None)
    assert (tmp_path / "load_over_time.png").exists()


def test_random_choices_have_the_measures_of_chance(tmp_path: Path) -> None:
    random = numpy.random.default_rng(5)
    recordings = {
        iteration: RoutingTrace(
            token_ids=random.permutation(numpy.arange(4000) % 5),
            blocks={1: random.integers(0, 8, (4000, 3))},
            num_blocks=8,
        )
        for iteration in (1, 2)
    }
    write(make_analysis([1], 8, 2, recordings=recordings), tmp_path, lambda text: None)
    layer_summary = json.loads((tmp_path / "summary.json").read_text())["layers"]["1"]
    assert layer_summary["coactivation_mean"] == pytest.approx(1, abs=0.25)
    assert layer_summary["token_overlap"] == pytest.approx(
        layer_summary["token_overlap_by_chance"], abs=0.05
    )
    assert layer_summary["kept"]["2"] == pytest.approx(layer_summary["kept_by_chance"], abs=0.02)
