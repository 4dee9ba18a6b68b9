"""Lines as curves and loads; folders without lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.analysis import lines
from megatron_sffn.utils.errors import ConfigError


def training(iteration: int, layer: int, **numbers: Any) -> dict[str, Any]:
    return {"iteration": iteration, "phase": "training", "layer": layer, **numbers}


def evaluation(iteration: int, layer: int, *tokens: int) -> dict[str, Any]:
    return {"iteration": iteration, "layer": layer, "tokens_per_block": list(tokens)}


LINES = [
    training(10, 2, load_entropy=0.5, gate_mean=None),
    training(10, 4, load_entropy=0.6, gate_mean=None, z_loss=2.0),
    {**evaluation(15, 2, 0, 4), "phase": "evaluation", "load_entropy": 0.0},
    training(20, 2, load_entropy=0.7, gate_mean=None),
    training(20, 4, load_entropy=0.8, gate_mean=None, z_loss=1.0),
    # As former versions wrote them.
    evaluation(20, 2, 3, 1),
]


def test_curves_of_the_numbers_that_are_known() -> None:
    found = lines.curves(LINES)
    assert list(found) == ["load_entropy", "z_loss"]
    assert found["load_entropy"][2] == lines.Curve(steps=(10, 20), values=(0.5, 0.7))
    assert list(found["z_loss"]) == [4]
    assert lines.layers_in(LINES) == [2, 4]


def test_loads_of_evaluations() -> None:
    found = lines.loads(LINES)
    assert list(found) == [2]
    assert found[2].steps == (15, 20)
    assert found[2].relative.tolist() == [[0, 2], [1.5, 0.5]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no routing.jsonl with lines"),
        ("", "has no routing.jsonl with lines"),
        ('{"iteration": 1, "lay', "has no routing.jsonl with lines"),
        ("not json\n", "cannot be read"),
        ("[1]\n", "cannot be read"),
        ('{"step": 1}\n', "cannot be read"),
    ],
)
def test_files_that_say_nothing(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "routing.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        lines.read_lines(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        lines.read_lines(tmp_path / "gone")


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    text = json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:20]
    (tmp_path / "routing.jsonl").write_text(text)
    assert lines.read_lines(tmp_path) == LINES[:1]
