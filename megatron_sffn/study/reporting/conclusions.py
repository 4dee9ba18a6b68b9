"""The text with which a report begins: what holds, what does not, and what was not run.

Inputs: findings. Outputs: `Conclusions`, which the page and the terminal show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sffn.study.reporting.findings import Findings
from megatron_sffn.study.reporting.orderings import LEVEL


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the text.

    Args:
        heading: of the part.
        sentences: of the part.
        if_none: the sentence that stands there if there is none.
    """

    heading: str
    sentences: tuple[str, ...]
    if_none: str


@dataclass(frozen=True, kw_only=True)
class Conclusions:
    """The whole text.

    Args:
        lead: the first sentences.
        parts: in the order of reading.
    """

    lead: str
    parts: tuple[Part, ...]

    def lines(self, most: int) -> Iterator[str]:
        """The text for a terminal.

        Args:
            most: number of sentences of a part that are shown; the others are counted.
        """
        yield self.lead
        for part in self.parts:
            yield f"\n{part.heading}"
            yield from (f"  {sentence}" for sentence in part.sentences[:most] or [part.if_none])
            if len(part.sentences) > most:
                yield f"  and {len(part.sentences) - most} more, on the page"


def conclude(findings: Findings) -> Conclusions:
    """The text of a report."""
    parts = [
        Part(
            heading="Orderings that hold",
            sentences=tuple(f"{item}." for item in findings.holding),
            if_none="None is beyond the spread of seeds.",
        ),
        Part(
            heading="Orderings that do not hold",
            sentences=tuple(f"{item}: may be chance." for item in findings.open),
            if_none="None of those that were tested.",
        ),
    ]
    if findings.untested:
        sentences = tuple(f"{item}." for item in findings.untested)
        parts.append(Part(heading="Not tested: a single seed", sentences=sentences, if_none=""))
    parts.append(
        Part(
            heading="What was not run",
            sentences=findings.gaps,
            if_none="Every series has the same block sizes, several seeds and tuned rates.",
        )
    )
    if findings.remarks:
        parts.append(Part(heading="Remarks", sentences=findings.remarks, if_none=""))
    return Conclusions(lead=_lead(findings), parts=tuple(parts))


def _lead(findings: Findings) -> str:
    runs, points = len(findings.results.rows), len(findings.points)
    best = min(findings.points, key=lambda point: point.loss)
    text = [
        f"{_many(runs, 'run')} of {_many(points, 'setting')} and "
        f"{_many(len(findings.sizes), 'size')}, each setting at its best learning rate.",
        f"The lowest loss is {best.loss:.4f} nats per token ({best.name}).",
    ]
    timed = [gain for gain in findings.gains if gain.mean.time is not None]
    if timed:
        fastest = max(timed, key=lambda gain: gain.mean.time or 0.0)
        text.append(
            f"The largest effective speedup over the dense model is {fastest.mean.time:.2f} "
            f"({fastest.point.name}), by a law {findings.law.source}."
        )
    text.append(
        f"An ordering holds if its p-value, corrected for the number of tests, is below {LEVEL}."
    )
    return " ".join(text)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
