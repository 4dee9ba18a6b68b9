"""The folder of a study whose losses are known, as `megatron-sffn sweep` leaves one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pandas

ROUTERS = {"avg-k": 0.0, "hash": 0.1}
"""Router -> nats per token above the best router."""
BLOCK_SIZES = (8, 32, 128, 512)
RATES = (5e-4, 1e-3, 2e-3)
WIDTHS = (128, 256)
SEEDS = (1, 2, 3)
SPREAD = 0.003
"""Standard deviation of the losses over seeds in nats per token."""
BEST_BLOCK = 32


def rows(
    *,
    widths: Iterable[int] = WIDTHS,
    seeds: Iterable[int] = SEEDS,
    rates: Sequence[float] = RATES,
    spread: float = SPREAD,
    columns: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of a study: dense, and two routers with their best loss at g = 32.

    Args:
        widths: hidden sizes.
        seeds: of each setting.
        rates: learning rates; 1e-3 is the best one.
        spread: standard deviation over seeds.
        columns: the only columns to keep, besides the needed ones; all of them if empty.
    """
    generator = numpy.random.default_rng(7)
    settings: list[tuple[str, int | None]] = [("dense", None), *product(ROUTERS, BLOCK_SIZES)]
    made = [
        _row(*setting, width, seed, lr, spread * generator.standard_normal())
        for width, setting, lr, seed in product(widths, settings, rates, seeds)
    ]
    needed = ("run", "point", "router", "block_size", "seed", "lr", "validation_loss")
    kept = (*needed, *columns)
    return [{n: v for n, v in row.items() if not columns or n in kept} for row in made]


def _row(
    router: str, g: int | None, width: int, seed: int, lr: float, noise: float
) -> dict[str, Any]:
    point = f"{router}-d{width}" if g is None else f"{router}-g{g}-d{width}"
    tokens, parameters = 20_000 * width, 12 * 4 * width**2
    loss = 2.0 + 1.5 * (width / 128) ** -0.3 + 0.2 * math.log10(lr / 1e-3) ** 2 + noise
    if g is not None:
        loss += ROUTERS[router] - 0.15 + 0.01 * math.log2(g / BEST_BLOCK) ** 2
    seconds = width * (1.0 if g is None else 1.2 + 4 / g)
    return {
        "run": f"{point}-lr{lr:g}-seed{seed}",
        "point": point,
        "router": router,
        "block_size": g,
        "expansion": None if g is None else 16.0,
        "active_cells": 4 * width,
        "seed": seed,
        "lr": lr,
        "hidden_size": width,
        "num_layers": 4,
        "iterations": 100,
        "tokens": tokens,
        "validation_loss": loss + 0.001,
        "validation_loss_tail": loss,
        "bits_per_byte": loss / 4 / math.log(2),
        "parameters_total": parameters * (1 if g is None else 11),
        "parameters_active": parameters,
        "flops_per_token": 2 * parameters,
        "training_flops": 6 * parameters * tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": 10**9,
        "load_entropy": None if g is None else 0.9,
        "dead_blocks": None if g is None else 0.01,
    }


def write(folder: Path, study: Sequence[dict[str, Any]], ending: str = "csv") -> Path:
    """Write the results and the losses of a study into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = {"results": pandas.DataFrame(study), "losses": pandas.DataFrame(_losses(study))}
    for name, frame in frames.items():
        path = folder / f"{name}.{ending}"
        if ending == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, index=False)
    return folder


def _losses(study: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row, step in product(study, range(10, 101, 10)):
        loss = row["validation_loss"] + 3 / step
        line = {"run": row["run"], "iteration": step, "tokens": 1000 * step, "loss": loss}
        yield {**line, "set": "training"}
