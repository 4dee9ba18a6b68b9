"""Writes one page on a run's routing: `index.html`, its plots, `tokens.csv`, `summary.json`.

Inputs: the lines of a run and the recordings of its checkpoints. Outputs: files in a folder.

Design notes: `summary.json` has the mean of everything that a plot shows, so that runs can be
compared; the page explains how to read each plot.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy

from megatron_sffn.analysis import charts, measures, tokens
from megatron_sffn.analysis.lines import Curve, Loads, curves, loads
from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.atomic_files import atomic_write_text

BLOCKS_SHOWN, IDS_SHOWN = 12, 8
"""Rows and columns of the table of token ids."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The data of the page.

    Args:
        run: the run's folder.
        lines: lines of its `routing.jsonl` about the layers to show.
        recordings: iteration -> recording, ascending.
        layers: layers to show, counted from 1.
        top: number of blocks in a matrix, the most used ones.
        decode: maps a token id to text.
    """

    run: Path
    lines: Sequence[dict[str, Any]]
    recordings: Mapping[int, RoutingTrace]
    layers: Sequence[int]
    top: int
    decode: tokens.Decode

    @property
    def last(self) -> int:
        """The last iteration that was recorded."""
        return max(self.recordings)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: plots, and how to read them."""

    title: str
    text: str
    pictures: tuple[str, ...]


def write(analysis: Analysis, folder: Path, say: Callable[[str], None]) -> Path:
    """Write the page and its files.

    Args:
        analysis: the data of the page.
        folder: folder of the files.
        say: called with a line about each section.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    layers: dict[int, dict[str, Any]] = {layer: {} for layer in analysis.layers}
    for section in (_metrics, _loads, _coactivation, _token_overlap, _tokens, _drift):
        say(f"plotting {section.__name__.strip('_').replace('_', ' ')}")
        sections += section(analysis, folder, layers)
    first, *_ = analysis.recordings.values()
    summary = {
        "run": str(analysis.run),
        "iterations": list(analysis.recordings),
        "recorded_tokens": len(first.token_ids),
        "num_blocks": first.num_blocks,
        "layers": {str(layer): numbers for layer, numbers in layers.items()},
    }
    atomic_write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    page = folder / "index.html"
    atomic_write_text(page, _page(analysis, sections, summary))
    return page


def _metrics(analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]) -> list[Section]:
    """The metrics that training logged."""
    curve_of = curves(analysis.lines)
    for name, curve_of_layer in curve_of.items():
        for layer, curve in curve_of_layer.items():
            layers[layer][name] = curve.values[-1]
    if not curve_of:
        return []
    charts.numbers(curve_of, folder / "numbers.png")
    text = (
        "The metrics of every step of training, with a line for each layer. In a healthy run the "
        "entropy rises towards 1 and no block is dead. If the largest load keeps growing, or the "
        "gates fall to 0, the router collapses."
    )
    return [Section(title="Training", text=text, pictures=("numbers.png",))]


def _loads(analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]) -> list[Section]:
    """The loads that evaluations counted; those of the recordings if there was no evaluation."""
    loads_of = loads(analysis.lines) or _recorded_loads(analysis)
    charts.load_over_time(loads_of, folder / "load_over_time.png")
    charts.load_now(loads_of, folder / "load.png")
    text = (
        "The tokens of each block in evaluation, in multiples of an even load: over time, with the "
        "blocks in the order of their last load, and at the end. Blocks whose rows keep their "
        "colour found their role early; blocks with blue rows at the bottom are hardly used."
    )
    pictures = ("load_over_time.png", "load.png")
    return [Section(title="Load of the blocks", text=text, pictures=pictures)]


def _recorded_loads(analysis: Analysis) -> dict[int, Loads]:
    """Layer -> loads of the recorded tokens."""
    steps = tuple(analysis.recordings)
    return {
        layer: Loads(
            steps=steps,
            tokens=numpy.stack(
                [
                    measures.load_of(recording.blocks[layer], recording.num_blocks)
                    for recording in analysis.recordings.values()
                ]
            ),
        )
        for layer in analysis.layers
    }


def _coactivation(
    analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]
) -> list[Section]:
    """Blocks that are chosen together."""
    recording, matrices = analysis.recordings[analysis.last], {}
    for layer in analysis.layers:
        blocks = recording.blocks[layer]
        block_ids = _most_used(recording, layer, analysis.top)
        matrix = measures.coactivation(blocks, block_ids, recording.num_blocks)
        order = measures.alike_together(matrix)
        matrices[layer] = matrix[order][:, order]
        pairs = matrix[~numpy.isnan(matrix)]
        layers[layer]["coactivation_mean"] = measures.mean_of_pairs(matrix)
        layers[layer]["coactivation_p95"] = (
            float(numpy.quantile(pairs, 0.95)) if len(pairs) else None
        )
    title = f"Blocks chosen together, step {analysis.last}"
    charts.coactivation(matrices, title, folder / "coactivation.png")
    text = (
        "The number of tokens that two blocks have in common, over the number for independent "
        "choices of the same load: red pairs are chosen together, blue pairs exclude each other. "
        "Red squares on the diagonal are groups of blocks that act as one larger block."
    )
    return [Section(title="Co-activation", text=text, pictures=("coactivation.png",))]


def _token_overlap(
    analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]
) -> list[Section]:
    """Blocks that serve the same token ids."""
    recording, matrices = analysis.recordings[analysis.last], {}
    ids = recording.token_ids
    for layer in analysis.layers:
        block_ids = _most_used(recording, layer, analysis.top)
        arguments = (block_ids, recording.num_blocks)
        counts = measures.token_counts(recording.blocks[layer], ids, *arguments)
        matrix = measures.overlap(counts)
        order = measures.alike_together(matrix)
        matrices[layer] = matrix[order][:, order]
        random_ids = tokens.shuffled(ids)
        random_counts = measures.token_counts(recording.blocks[layer], random_ids, *arguments)
        layers[layer]["token_overlap"] = measures.mean_of_pairs(matrix)
        layers[layer]["token_overlap_by_chance"] = measures.mean_of_pairs(
            measures.overlap(random_counts)
        )
    title = f"Token ids in common, step {analysis.last}"
    charts.overlap(matrices, title, folder / "overlap.png")
    text = (
        "The similarity of the token ids of two blocks: the sum of the smaller shares over the sum "
        "of the larger ones. If it is far below the value by chance, the blocks have divided the "
        "vocabulary among themselves; if it is near, routing depends on more than the token id."
    )
    return [Section(title="Token overlap between blocks", text=text, pictures=("overlap.png",))]


def _tokens(analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]) -> list[Section]:
    """Token ids of the most used blocks."""
    recording = analysis.recordings[analysis.last]
    rows, pictures = [], []
    for layer in analysis.layers:
        layer_rows = tokens.served(
            recording, layer, analysis.decode, blocks=analysis.top, ids=IDS_SHOWN
        )
        rows += layer_rows
        shown = list(dict.fromkeys(row.block for row in layer_rows))[:BLOCKS_SHOWN]
        name = f"tokens_layer_{layer}.png"
        title = f"Token ids of the most used blocks, layer {layer}, step {analysis.last}"
        charts.token_table([row for row in layer_rows if row.block in shown], title, folder / name)
        pictures.append(name)
    atomic_write_text(folder / "tokens.csv", tokens.as_csv(rows))
    text = (
        f"The token ids that mark each of the {BLOCKS_SHOWN} most used blocks: more frequent in "
        "the block than elsewhere, and frequent enough to matter. tokens.csv has the same for all "
        "blocks of the matrices above."
    )
    return [Section(title="Which tokens a block serves", text=text, pictures=tuple(pictures))]


def _drift(analysis: Analysis, folder: Path, layers: dict[int, dict[str, Any]]) -> list[Section]:
    """The share of a token's blocks that stays from checkpoint to checkpoint."""
    steps = list(analysis.recordings)
    if len(steps) < 2:
        return []
    to_next, to_last, chance = {}, {}, {}
    for layer in analysis.layers:
        blocks = [recording.blocks[layer] for recording in analysis.recordings.values()]
        num_blocks = analysis.recordings[steps[0]].num_blocks
        kept_shares = [
            measures.kept(before, after, num_blocks) for before, after in pairwise(blocks)
        ]
        shared_with_last = [measures.kept(before, blocks[-1], num_blocks) for before in blocks[:-1]]
        to_next[layer] = Curve(steps=tuple(steps[1:]), values=tuple(kept_shares))
        to_last[layer] = Curve(steps=tuple(steps[:-1]), values=tuple(shared_with_last))
        chance[layer] = measures.kept_by_chance(blocks[-2], blocks[-1], num_blocks)
        layers[layer]["kept"] = dict(zip(map(str, steps[1:]), kept_shares, strict=True))
        layers[layer]["kept_by_chance"] = chance[layer]
    charts.drift(to_last, to_next, chance, folder / "drift.png")
    text = (
        "The share of its blocks that a token keeps from checkpoint to checkpoint. It should rise "
        "towards the end of training; if a layer stays near chance, its router has not found a "
        "stable division of the tokens."
    )
    return [Section(title="Drift", text=text, pictures=("drift.png",))]


def _most_used(recording: RoutingTrace, layer: int, top: int) -> measures.Ints:
    """The most used blocks of a layer."""
    load = measures.load_of(recording.blocks[layer], recording.num_blocks)
    return measures.most_used(load, top)


# --- the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; display: block; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
p { max-width: 45rem }
"""

COLUMNS = {
    "load_entropy": "load entropy",
    "dead_share": "dead blocks",
    "load_max": "largest load",
    "coactivation_p95": "co-activation, p95",
    "token_overlap": "token overlap",
    "token_overlap_by_chance": "by chance",
    "kept": "kept since the checkpoint before",
    "kept_by_chance": "by chance",
}
"""Metric of a layer -> its heading in the page's table."""


def _page(analysis: Analysis, sections: Sequence[Section], summary: Mapping[str, Any]) -> str:
    """The page as HTML."""
    name = html.escape(str(analysis.run))
    introduction = (
        f"{summary['num_blocks']:,} blocks per layer; checkpoints "
        f"{', '.join(map(str, summary['iterations']))}, each with the same first "
        f"{summary['recorded_tokens']:,} validation tokens; layers are counted from 1."
    )
    body = [f"<h1>Routing of {name}</h1>", f"<p>{introduction}</p>"]
    body.append(_table(summary["layers"]))
    for section in sections:
        body += [f"<h2>{section.title}</h2>", f"<p>{section.text}</p>"]
        body += [f'<img src="{picture}" alt="{section.title}">' for picture in section.pictures]
    head = f'<meta charset="utf-8"><title>Routing of {name}</title><style>{STYLE}</style>'
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"
    )


def _table(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """The last metrics of each layer, as an HTML table."""
    known = [name for name in COLUMNS if any(name in metrics for metrics in layers.values())]
    rows = ["<tr><th>layer</th>" + "".join(f"<th>{COLUMNS[name]}</th>" for name in known) + "</tr>"]
    for layer, metrics in layers.items():
        cells = "".join(f"<td>{_cell(metrics.get(name))}</td>" for name in known)
        rows.append(f"<tr><td>{layer}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _cell(value: Any) -> str:
    """A number with three digits; the last one if there is one for each checkpoint."""
    if isinstance(value, dict):
        value = list(value.values())[-1]
    return "" if value is None else f"{value:.3g}"
