"""Counts and sizes as a person reads them."""

from __future__ import annotations


def human_count(number: float) -> str:
    """12345678 as `12.3 M`, ready for a unit; 512 as `512 `."""
    for power, letter in ((6, "E"), (5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if number >= 1000**power:
            return f"{number / 1000**power:.1f} {letter}"
    return f"{number:.0f} "


def human_size(num_bytes: float) -> str:
    """12345678 bytes as `12.3 MB`."""
    return f"{human_count(num_bytes)}B"
