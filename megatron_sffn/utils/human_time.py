"""Durations as a person reads them."""

from __future__ import annotations


def human_time(seconds: float) -> str:
    """3723.4 seconds as `1:02:03`."""
    rounded = max(0, round(seconds))
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"
