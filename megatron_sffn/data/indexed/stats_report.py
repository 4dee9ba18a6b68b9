"""Reports the statistics of data sets as text, as JSON and as a plot.

Inputs: the statistics of `stats.py`. Outputs: lines, a record for JSON, a PNG, PDF or SVG file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_sffn.data.indexed.format import Index
from megatron_sffn.data.indexed.stats import Counts, Lengths, Sample
from megatron_sffn.utils.atomic_files import atomic_path
from megatron_sffn.utils.errors import ConfigError, require
from megatron_sffn.utils.human_size import human_size

BAR_WIDTH = 30
"""Characters of the longest bar."""
PLOT_ENDINGS = (".png", ".pdf", ".svg")

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The statistics of some data sets.

    Args:
        indices: indices of the data sets.
        lengths: lengths of the documents.
        ids: number of occurrences of each id; None if the ids were not read.
        top: number of the most frequent ids to show.
        vocab_size: vocabulary size of the tokenizer; None without a tokenizer.
        samples: sampled documents.
    """

    indices: Sequence[Index]
    lengths: Lengths
    ids: Counts | None
    top: int
    vocab_size: int | None
    samples: Sequence[Sample]


def as_record(statistics: Statistics, decode: Decode | None) -> dict[str, Any]:
    """The statistics as a record for JSON."""
    lengths = statistics.lengths
    record: dict[str, Any] = {
        "data_sets": [
            {
                "prefix": index.prefix,
                "dtype": str(index.dtype),
                "documents": index.num_documents,
                "sequences": index.num_sequences,
                "tokens": index.num_tokens,
                "bytes": index.num_bytes,
            }
            for index in statistics.indices
        ],
        "documents": lengths.documents,
        "sequences": sum(index.num_sequences for index in statistics.indices),
        "tokens": lengths.tokens,
        "tokens_per_document": {
            "min": int(lengths.values[0]),
            "median": lengths.median,
            "mean": lengths.tokens / lengths.documents,
            "max": int(lengths.values[-1]),
        },
        "lengths": lengths.bins(),
        "samples": [asdict(sample) | _text(sample.ids, decode) for sample in statistics.samples],
    }
    if statistics.ids is not None:
        occurring = numpy.flatnonzero(statistics.ids)
        record["ids"] = {
            "smallest": int(occurring[0]),
            "largest": int(occurring[-1]),
            "distinct": len(occurring),
            "vocab_size": statistics.vocab_size,
            "most_frequent": _most_frequent(statistics.ids, statistics.top, decode),
        }
    return record


def _most_frequent(ids: Counts, top: int, decode: Decode | None) -> list[dict[str, Any]]:
    # A stable sort, so that equally frequent ids have the same order on every machine.
    order = numpy.argsort(-ids, kind="stable")[:top].tolist()
    return [
        {"id": token_id, "count": int(ids[token_id])} | _text([token_id], decode)
        for token_id in order
        if ids[token_id]
    ]


def _text(ids: list[int], decode: Decode | None) -> dict[str, str]:
    return {"text": decode(ids)} if decode else {}


def as_lines(record: dict[str, Any]) -> list[str]:
    """A record of `as_record` as lines for a terminal."""
    lines = [
        f"{data_set['prefix']}: {_counts(data_set)} ({data_set['dtype']}, "
        f"{human_size(data_set['bytes'])})"
        for data_set in record["data_sets"]
    ]
    if len(lines) > 1:
        lines.append(f"together: {_counts(record)}")
    per = record["tokens_per_document"]
    lines += [
        f"tokens per document: min {per['min']:,}, median {per['median']:,.0f}, mean "
        f"{per['mean']:,.1f}, max {per['max']:,}",
        "",
        *_histogram(record),
    ]
    if "ids" in record:
        lines += ["", *_frequencies(record)]
    for sample in record["samples"]:
        lines += ["", *_sample(sample)]
    return lines


def _counts(record: dict[str, Any]) -> str:
    return (
        f"{record['documents']:,} documents, {record['sequences']:,} sequences, "
        f"{record['tokens']:,} tokens"
    )


def _histogram(record: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{bin['from']:,}" if bin["from"] == bin["to"] else f"{bin['from']:,}-{bin['to']:,}",
            bin["documents"],
            bin["tokens"] / max(record["tokens"], 1),
        )
        for bin in record["lengths"]
    ]
    most = max(documents for _, documents, _ in rows)
    width = max(len("tokens"), *(len(name) for name, _, _ in rows))
    lines = [f"{'tokens':>{width}}  {'documents':>13}  share of tokens"]
    for name, documents, share in rows:
        bar = "█" * round(BAR_WIDTH * documents / most)
        lines.append(f"{name:>{width}}  {documents:>13,}  {share:>15.1%}  {bar}".rstrip())
    return lines


def _frequencies(record: dict[str, Any]) -> list[str]:
    ids = record["ids"]
    vocabulary = f" of a vocabulary of {ids['vocab_size']:,}" if ids["vocab_size"] else ""
    lines = [
        f"ids: {ids['smallest']:,} to {ids['largest']:,}, {ids['distinct']:,} different ones"
        f"{vocabulary}; most frequent:"
    ]
    for entry in ids["most_frequent"]:
        text = f"  {entry['text']!r}" if "text" in entry else ""
        lines.append(f"{entry['id']:>10}  {entry['count'] / record['tokens']:>7.2%}{text}")
    return lines


def _sample(sample: dict[str, Any]) -> list[str]:
    shown = len(sample["ids"])
    truncated = "" if shown == sample["length"] else f", the first {shown:,}"
    ids = " ".join(map(str, sample["ids"]))
    return [
        f"document {sample['number']:,} of {sample['prefix']}, "
        f"{sample['length']:,} tokens{truncated}:",
        sample.get("text", ids),
    ]


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written, before the data sets are read."""
    require("matplotlib", "--plot", "plot")
    if path.suffix not in PLOT_ENDINGS:
        raise ConfigError(
            f"--plot {path} is no picture that can be drawn; let its name end in "
            f"{', '.join(PLOT_ENDINGS)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path} lies in no folder; create {path.parent} first")


def plot(lengths: Lengths, title: str, path: Path) -> None:
    """Plot histograms over the lengths: of the documents, and of their tokens."""
    from matplotlib.figure import Figure

    bins = lengths.bins()
    edges = [bin["from"] for bin in bins] + [bins[-1]["to"] + 1]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, quantity in zip(figure.subplots(1, 2), ("documents", "tokens"), strict=True):
        axes.stairs([bin[quantity] for bin in bins], edges, fill=True, color="#d9622b")
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel(
            f"{quantity} in documents of this length" if quantity == "tokens" else quantity
        )
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=110)
