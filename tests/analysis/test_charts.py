"""Charts draw a single number per layer as bars, and have no empty panels or hidden lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sffn.accounting.comparison import same_lines
from megatron_sffn.analysis import charts
from megatron_sffn.analysis.lines import Curve
from megatron_sffn.analysis.tokens import Served


@pytest.fixture
def draw_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """`draw_figure(chart, *arguments)`: the figure that a chart writes to a file."""
    figures: list[Figure] = []
    save = Figure.savefig

    def save_and_record(figure: Figure, path: Any, **options: Any) -> None:
        save(figure, path, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save_and_record)

    def save_and_draw(chart: Callable[..., None], *arguments: Any) -> Figure:
        path = tmp_path / "chart.png"
        chart(*arguments, path)
        assert path.stat().st_size > 1000
        return figures[-1]

    return save_and_draw


def curve(values: list[float], first: int = 10) -> Curve:
    steps = tuple(range(first, first + 10 * len(values), 10))
    return Curve(steps=steps, values=tuple(values))


def test_a_number_that_is_always_zero_is_named_without_a_panel(draw_figure: Any) -> None:
    curves = {
        "load_entropy": {1: curve([0.9, 0.95]), 3: curve([0.8, 0.9])},
        "dead_share": {1: curve([0.0, 0.0]), 3: curve([0.0, 0.25])},
        "empty_share": {1: curve([0.0, 0.0]), 3: curve([0.0, 0.0])},
    }
    figure = draw_figure(charts.numbers, curves)
    assert [axes.get_title() for axes in figure.axes] == ["load entropy", "dead blocks"]
    assert figure.get_suptitle().endswith("0 in every layer at every step: places left empty")
    # A line at 0 lies inside the panel, not on its axis.
    assert figure.axes[1].get_ylim()[0] < 0
    # If no other number is known, the zeros are drawn.
    (axes,) = draw_figure(charts.numbers, {"empty_share": curves["empty_share"]}).axes
    assert axes.get_title() == "places left empty"


def test_the_drift_of_two_checkpoints_is_drawn_as_a_bar_per_layer(draw_figure: Any) -> None:
    to_last = {2: curve([0.25]), 4: curve([0.75])}
    to_next = {2: curve([0.25], first=20), 4: curve([0.75], first=20)}
    figure = draw_figure(charts.drift, to_last, to_next, {2: 0.1, 4: 0.2})
    (axes,) = figure.axes
    assert figure.get_suptitle() == "Drift from step 10 to step 20"
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75]
    assert [text.get_text() for text in axes.texts] == ["25%", "75%"]
    (chance,) = axes.collections
    assert [line[0][1] for line in chance.get_segments()] == [0.1, 0.2]


def test_the_drift_of_more_checkpoints_is_drawn_as_lines_in_two_panels(draw_figure: Any) -> None:
    to_last, to_next = {1: curve([0.2, 0.6])}, {1: curve([0.5, 0.6], first=20)}
    figure = draw_figure(charts.drift, to_last, to_next, {1: 0.1})
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert not axes.patches and len(axes.lines[0].get_xdata()) == 2


def test_an_underscore_of_a_token_does_not_touch_the_numbers_below_it(draw_figure: Any) -> None:
    rows = [
        Served(
            layer=1,
            block=block,
            load=1.0,
            rank=1,
            token_id=3,
            text="_x_",
            count=8,
            share=0.08,
            ratio=1.5,
        )
        for block in range(12)
    ]
    figure = draw_figure(charts.token_table, rows, "Token ids")
    renderer = FigureCanvasAgg(figure).get_renderer()
    (table,) = figure.axes[0].tables
    cell = table[1, 2]
    text = cell.get_text()
    assert text.get_text() == "_x_\n8%, 1.5×"
    size = text.get_fontsize() * figure.dpi / 72
    two_lines = text.get_window_extent(renderer)
    # With Matplotlib's line height, 1.2 times the font size, an underscore touches the digits.
    assert two_lines.height / 2 > 1.5 * size
    assert two_lines.height < cell.get_window_extent(renderer).height


def test_routers_with_the_same_line_share_a_line_with_all_names() -> None:
    lines = {
        "avg-k": {16: 2.0, 64: 0.5},
        "rand-hash": {16: 0.0, 64: 0.0},
        "switch": {16: 2.001, 64: 0.5},
        "noisy-top-k": {16: 2.1, 64: 0.5},
        "pkm": {1: 2.0},
        "dense": {16: 0.0, 64: 0.0},
    }
    assert same_lines(lines) == [
        ["avg-k", "switch"],
        ["rand-hash", "dense"],
        ["noisy-top-k"],
        ["pkm"],
    ]
