"""What was not run, and what therefore cannot be said.

Inputs: points and the learning rates of their settings. Outputs: sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_sffn.study.learning_rates import MIN_RATES, TRANSFERRED, Valley
from megatron_sffn.study.reporting.points import DENSE, Point, dense_of

NAMED = 8
"""Names in a sentence; more are counted."""


def some(names: Sequence[str]) -> str:
    """Names in a sentence, the first ones if there are many."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def gaps(points: Sequence[Point], valleys: Sequence[Valley]) -> list[str]:
    """A sentence for each kind of gap."""
    return [
        *_missing_settings(points),
        *_only_ladders(points, valleys),
        *_seeds(points),
        *_rates(valleys),
    ]


def _missing_settings(points: Sequence[Point]) -> Iterator[str]:
    """Dense models, and block sizes that another series of the same size has."""
    sparse = [point for point in points if point.router != DENSE]
    alone = [point.name for point in sparse if dense_of(point, points) is None]
    if alone:
        yield f"No dense model of the same size and tokens as {some(alone)}."
    blocks = sorted({point.block_size for point in sparse if point.block_size is not None})
    present = {(point.size, point.series, point.block_size) for point in sparse}
    lines = dict.fromkeys((point.size, point.series) for point in sparse)
    missing = [
        f"{series} at g {block}" + (f", d {size.hidden_size}" if size.hidden_size else "")
        for size, series in lines
        for block in blocks
        if (size, series, block) not in present
    ]
    if missing:
        yield f"Block sizes that other series have: {some(missing)}."
    if not sparse:
        yield "No sparse model."


def _seeds(points: Sequence[Point]) -> Iterator[str]:
    seeds = {seed for point in points for seed in point.seeds}
    single = [point.name for point in points if len(point.losses) == 1]
    if single:
        yield f"A second seed, so that the spread is unknown: {some(single)}."
    fewer = [
        f"{point.name} lacks {', '.join(map(str, sorted(seeds - set(point.seeds))))}"
        for point in points
        if 1 < len(point.losses) < len(seeds)
    ]
    if fewer:
        yield f"Some seeds: {some(fewer)}."


def _only_ladders(points: Sequence[Point], valleys: Sequence[Valley]) -> Iterator[str]:
    trained = {point.name for point in points}
    only = [valley.point for valley in valleys if valley.point not in trained]
    if only:
        yield f"Runs at the best rate of the ladder: {some(only)}."


def _rates(valleys: Sequence[Valley]) -> Iterator[str]:
    few = [
        valley.point
        for valley in valleys
        if len(valley.rates) < MIN_RATES and valley.source != TRANSFERRED
    ]
    if few:
        yield (
            f"A ladder of {MIN_RATES} learning rates: {some(few)}. Their comparison measures the "
            "learning rate, too."
        )
    edges = [
        f"{valley.point} at {valley.best:.3g} ({_end(valley)})"
        for valley in valleys
        if valley.at_edge
    ]
    if edges:
        yield f"Learning rates beyond the edge of a ladder, where the best one lies: {some(edges)}."


def _end(valley: Valley) -> str:
    return "the lowest" if valley.best == valley.rates[0] else "the highest"
