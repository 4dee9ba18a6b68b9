"""What was found in data sets, for a terminal, for other programs, and as a picture.

Enters: what `stats.py` counted. Leaves: lines, a JSON-able record, a PNG, PDF or SVG file.
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

BAR = 30
"""Characters of the longest bar."""
PICTURES = (".png", ".pdf", ".svg")

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that is known of some data sets.

    Args:
        indices: of the sets.
        lengths: of their documents, in tokens.
        ids: how often each id occurs; None if the ids were not read.
        top: the most frequent ids to show.
        vocab_size: of the tokenizer; None if there is none.
        samples: some documents.
    """

    indices: Sequence[Index]
    lengths: Lengths
    ids: Counts | None
    top: int
    vocab_size: int | None
    samples: Sequence[Sample]


def as_record(found: Findings, decode: Decode | None) -> dict[str, Any]:
    """The findings as JSON has them."""
    lengths = found.lengths
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
            for index in found.indices
        ],
        "documents": lengths.documents,
        "sequences": sum(index.num_sequences for index in found.indices),
        "tokens": lengths.tokens,
        "tokens_per_document": {
            "min": int(lengths.values[0]),
            "median": lengths.median,
            "mean": lengths.tokens / lengths.documents,
            "max": int(lengths.values[-1]),
        },
        "lengths": lengths.bins(),
        "samples": [asdict(sample) | _text(sample.ids, decode) for sample in found.samples],
    }
    if found.ids is not None:
        occurring = numpy.flatnonzero(found.ids)
        record["ids"] = {
            "smallest": int(occurring[0]),
            "largest": int(occurring[-1]),
            "distinct": len(occurring),
            "vocab_size": found.vocab_size,
            "most_frequent": _most_frequent(found.ids, found.top, decode),
        }
    return record


def _most_frequent(ids: Counts, top: int, decode: Decode | None) -> list[dict[str, Any]]:
    # Stable: of ids that occur alike, the smaller is the first on every machine.
    order = numpy.argsort(-ids, kind="stable")[:top].tolist()
    return [{"id": at, "count": int(ids[at])} | _text([at], decode) for at in order if ids[at]]


def _text(ids: list[int], decode: Decode | None) -> dict[str, str]:
    return {"text": decode(ids)} if decode else {}


def as_lines(record: dict[str, Any]) -> list[str]:
    """The same for a terminal."""
    lines = [
        f"{one['prefix']}: {_counts(one)} ({one['dtype']}, {human_size(one['bytes'])})"
        for one in record["data_sets"]
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
            f"{one['from']:,}" if one["from"] == one["to"] else f"{one['from']:,}-{one['to']:,}",
            one["documents"],
            one["tokens"] / max(record["tokens"], 1),
        )
        for one in record["lengths"]
    ]
    most = max(documents for _, documents, _ in rows)
    width = max(len("tokens"), *(len(name) for name, _, _ in rows))
    lines = [f"{'tokens':>{width}}  {'documents':>13}  share of tokens"]
    for name, documents, share in rows:
        bar = "█" * round(BAR * documents / most)
        lines.append(f"{name:>{width}}  {documents:>13,}  {share:>15.1%}  {bar}".rstrip())
    return lines


def _frequencies(record: dict[str, Any]) -> list[str]:
    ids = record["ids"]
    vocabulary = f" of a vocabulary of {ids['vocab_size']:,}" if ids["vocab_size"] else ""
    lines = [
        f"ids: {ids['smallest']:,} to {ids['largest']:,}, {ids['distinct']:,} different ones"
        f"{vocabulary}; most frequent:"
    ]
    for one in ids["most_frequent"]:
        text = f"  {one['text']!r}" if "text" in one else ""
        lines.append(f"{one['id']:>10}  {one['count'] / record['tokens']:>7.2%}{text}")
    return lines


def _sample(sample: dict[str, Any]) -> list[str]:
    shown = len(sample["ids"])
    part = "" if shown == sample["length"] else f", the first {shown:,}"
    ids = " ".join(map(str, sample["ids"]))
    return [
        f"document {sample['number']:,} of {sample['prefix']}, {sample['length']:,} tokens{part}:",
        sample.get("text", ids),
    ]


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is counted."""
    require("matplotlib", "--plot", "plot")
    if path.suffix not in PICTURES:
        raise ConfigError(
            f"--plot {path} is no picture that can be drawn; let its name end in "
            f"{', '.join(PICTURES)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path} lies in no folder; create {path.parent} first")


def draw(lengths: Lengths, title: str, path: Path) -> None:
    """A histogram of the lengths: of documents, and of the tokens in them."""
    from matplotlib.figure import Figure

    bins = lengths.bins()
    edges = [one["from"] for one in bins] + [bins[-1]["to"] + 1]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, what in zip(figure.subplots(1, 2), ("documents", "tokens"), strict=True):
        axes.stairs([one[what] for one in bins], edges, fill=True, color="#d9622b")
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel(f"{what} in documents of this length" if what == "tokens" else what)
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=110)
