"""Lines of routing.jsonl become curves and loads; folders without lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.analysis import lines
from megatron_sffn.utils.errors import ConfigError


def training_line(iteration: int, layer: int, **numbers: Any) -> dict[str, Any]:
    return {"iteration": iteration, "phase": "training", "layer": layer, **numbers}


def evaluation_line(iteration: int, layer: int, *tokens: int) -> dict[str, Any]:
    return {"iteration": iteration, "layer": layer, "tokens_per_block": list(tokens)}


LINES = [
    training_line(10, 2, load_entropy=0.5, gate_mean=None),
    training_line(10, 4, load_entropy=0.6, gate_mean=None, z_loss=2.0),
    {**evaluation_line(15, 2, 0, 4), "phase": "evaluation", "load_entropy": 0.0},
    training_line(20, 2, load_entropy=0.7, gate_mean=None),
    training_line(20, 4, load_entropy=0.8, gate_mean=None, z_loss=1.0),
    # Former versions wrote no phase.
    evaluation_line(20, 2, 3, 1),
]


def test_curves_hold_the_known_numbers_of_training_lines() -> None:
    curves = lines.curves(LINES)
    assert list(curves) == ["load_entropy", "z_loss"]
    assert curves["load_entropy"][2] == lines.Curve(steps=(10, 20), values=(0.5, 0.7))
    assert list(curves["z_loss"]) == [4]
    assert lines.layers_in(LINES) == [2, 4]


def test_loads_come_from_evaluation_lines() -> None:
    loads = lines.loads(LINES)
    assert list(loads) == [2]
    assert loads[2].steps == (15, 20)
    assert loads[2].relative.tolist() == [[0, 2], [1.5, 0.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no routing.jsonl with lines"),
        ("", "has no routing.jsonl with lines"),
        ('{"iteration": 1, "lay', "has no routing.jsonl with lines"),
        ("not json\n", "cannot be read"),
        ("[1]\n", "cannot be read"),
        ('{"step": 1}\n', "cannot be read"),
    ],
)
def test_files_without_valid_lines_are_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "routing.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        lines.read_lines(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        lines.read_lines(tmp_path / "gone")


def test_an_incomplete_last_line_is_not_read(tmp_path: Path) -> None:
    text = json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:20]
    (tmp_path / "routing.jsonl").write_text(text)
    assert lines.read_lines(tmp_path) == LINES[:1]
