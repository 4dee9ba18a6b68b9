"""Time calls: by CUDA events on a GPU, by the host's clock in a dry run.

Inputs: a call. Outputs: the milliseconds of each repetition, after one to warm up.

Design notes: before each repetition a buffer larger than the L2 cache is written, so that the cache
holds nothing of the last repetition. Repetitions are launched without waiting for the device, so
that launches overlap with the computation before them, as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.gpu.case import Context

L2_TIMES = 2
"""Size of the buffer that is written between repetitions, in sizes of the L2 cache."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The milliseconds of a call.

    Args:
        ms: milliseconds of every repetition.
        peak: the most bytes allocated while it ran, without the buffer of the clock; 0 in a dry
            run.
    """

    ms: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """The median, which is the number to quote."""
        return median(self.ms)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for one repetition."""
        if len(self.ms) < 2:
            return 0.0
        low, _, high = quantiles(self.ms)
        return (high - low) / self.median


def measure(
    call: Callable[[], Any], context: Context, *, seconds: float = 0.3, max_repeats: int = 20
) -> Measured:
    """Time a call.

    Args:
        call: the function to time; its result is dropped.
        context: context of the section.
        seconds: limit for all repetitions; a longer call is repeated once.
        max_repeats: the largest number of repetitions.
    """
    context.synchronize()
    start = time.perf_counter()
    call()
    context.synchronize()
    call_seconds = time.perf_counter() - start
    # The first call may have compiled a kernel, so a second call estimates a repetition.
    if call_seconds < seconds * 10:
        start = time.perf_counter()
        call()
        context.synchronize()
        call_seconds = time.perf_counter() - start
    repeats = max(1, min(max_repeats, int(seconds / max(call_seconds, 1e-6))))
    if context.dry:
        return Measured(ms=tuple(_on_host(call) for _ in range(min(repeats, 2))), peak=0)
    return _on_gpu(call, repeats)


def _on_host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _on_gpu(call: Callable[[], Any], repeats: int) -> Measured:
    properties = torch.cuda.get_device_properties()
    cache = int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
    buffer = torch.empty(L2_TIMES * cache, dtype=torch.int8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    events = []
    for _ in range(repeats):
        buffer.zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return Measured(
        ms=tuple(start.elapsed_time(end) for start, end in events),
        peak=torch.cuda.max_memory_allocated() - buffer.nbytes,
    )
