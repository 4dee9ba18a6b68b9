"""Reads the scalars of a run from TensorBoard's events."""

from __future__ import annotations

import logging
from pathlib import Path


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of all starts of a run, with ascending steps.

    If a step was repeated after a kill, its last event counts.
    """
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 scalars means no limit.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: dict(sorted({event.step: event.value for event in events.Scalars(tag)}.items()))
        for tag in events.Tags()["scalars"]
    }
