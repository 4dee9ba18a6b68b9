"""The sections of each command, most valuable first, with the seconds that each should get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a command, which runs in its own process.

    Args:
        name: name of the module `benchmarks.gpu.sections.<name>`, which has `cases(context)`.
        seconds: nominal; a section gets its share of the remaining time.
        isolated: True if each case gets a fresh process, because a failed device assertion in
            another package ends CUDA for the whole process.
    """

    name: str
    seconds: float
    isolated: bool = False


PLANS: dict[str, tuple[Section, ...]] = {
    "check": (
        Section(name="env", seconds=15),
        Section(name="ops", seconds=110),
        Section(name="route", seconds=20),
        Section(name="train", seconds=140),
        Section(name="syncs", seconds=40),
        Section(name="sanitizer", seconds=120),
        Section(name="peers", seconds=60, isolated=True),
    ),
    "time": (
        Section(name="products", seconds=180),
        Section(name="layers", seconds=130),
        Section(name="routed", seconds=50),
        Section(name="timed_peers", seconds=80, isolated=True),
        Section(name="steps", seconds=100),
    ),
    "tune": (
        Section(name="tune", seconds=400),
        Section(name="ncu", seconds=120),
    ),
}


def share(sections: tuple[Section, ...], seconds_left: float) -> float:
    """Seconds for the next section, if all remaining sections share the remaining time."""
    return seconds_left * sections[0].seconds / sum(section.seconds for section in sections)
