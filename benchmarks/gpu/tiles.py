"""Observes and replaces the tables of tile sizes of the Triton kernels.

Design notes: the entry that a product looks up is found by replacing the table with one that
records look-ups. Candidates are the current tiles and their neighbours, with one field changed at a
time; all fields of the record are tried, so that a new field needs no change of this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.case import Context, NotHere
from benchmarks.gpu.problem import Size, draw, sorted_pairs
from megatron_sffn.ops import device
from megatron_sffn.ops.block_ffn import triton_fused as fused
from megatron_sffn.ops.block_ffn import triton_grouped

MOST_CANDIDATES = 12
"""Most candidates per entry, including the current tiles."""

Key = tuple[str, torch.dtype, str]
"""A key of `TILES`: device, dtype, kind."""


class RecordingTable(dict[Key, Any]):
    """A table of tiles that records look-ups, and can answer them with a candidate.

    Args:
        table: the table of the module.
    """

    def __init__(self, table: dict[Key, Any]) -> None:
        super().__init__(table)
        self.kinds: set[str] = set()
        self.candidate: Any = None

    def get(self, key: Key, default: Any = None) -> Any:
        """The candidate if there is one, else the entry for the device, else that for `any`."""
        return self[key]

    def __getitem__(self, key: Key) -> Any:
        self.kinds.add(key[2])
        if self.candidate is not None:
            return self.candidate
        tiles = super().get(key)
        return super().__getitem__(("any", *key[1:])) if tiles is None else tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """An entry of a table to tune: the one that a product looks up for a block size.

    Args:
        module: name of the module with the product.
        product: name.
        cells: g.
    """

    module: str
    product: str
    cells: int

    @property
    def name(self) -> str:
        """A description of the job."""
        return f"{self.module}.{self.product} g={self.cells}"


def jobs(context: Context) -> list[Job]:
    """The jobs of all modules with a table, and of the fused products; one of each in a dry run."""
    products = [
        (name, product)
        for name, module in forms.modules().items()
        if forms.tuned(module)
        for product in forms.PRODUCTS
    ]
    products += [(forms.FUSED, product) for product in forms.FUSED_PRODUCTS]
    if context.dry:
        products = [products[0], products[-1]]
    return [
        Job(module=name, product=product, cells=g)
        for g in context.choose((256, 16, 1), (16,))
        for name, product in products
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A job in progress.

    Args:
        table: the replaced table of its module.
        call: runs the product.
        kind: the entry that it looks up.
        tried: the candidates, of which the current tiles are the first.
    """

    table: RecordingTable
    call: Callable[[], Any]
    kind: str
    tried: list[Any]


@contextmanager
def opened(job: Job, context: Context) -> Iterator[Tuned]:
    """Replace the table of a job's module, and find the entry that the product looks up.

    Raises:
        NotHere: if the product looks up no entry, or more than one.
    """
    module: Any = triton_grouped if job.module == forms.FUSED else forms.modules()[job.module]
    original, table = module.TILES, RecordingTable(module.TILES)
    module.TILES = table
    try:
        call = call_of(job, context)
        call()
        if len(table.kinds) != 1:
            kinds = ", ".join(sorted(table.kinds)) or "none"
            raise NotHere(f"{job.product} does not look up exactly one entry of its table: {kinds}")
        (kind,) = table.kinds
        dtype = forms.dtype_for(job.module, context)
        current = original.get((card(), dtype, kind)) or original["any", dtype, kind]
        tried = candidates(current)[: context.choose(MOST_CANDIDATES, 2)]
        yield Tuned(table=table, call=call, kind=kind, tried=tried)
    finally:
        module.TILES = original


def candidates(current: Any) -> list[Any]:
    """Tiles and their neighbours: each whole number doubled and halved, stages changed by one."""
    result = [current]
    for field in dataclasses.fields(current):
        value = getattr(current, field.name)
        if isinstance(value, bool):
            steps: tuple[Any, ...] = (not value,)
        elif not isinstance(value, int):
            continue
        elif field.name == "stages":
            steps = (value + 1, value - 1)
        else:
            steps = (value * 2, value // 2)
        result += [
            dataclasses.replace(current, **{field.name: step})
            for step in steps
            if isinstance(step, bool) or step >= 1
        ]
    return result[:MOST_CANDIDATES]


def call_of(job: Job, context: Context) -> Callable[[], Any]:
    """The product of a job at a real size; each call derives everything from the pairs again."""
    target = context.device
    tokens, width, active = context.choose((8192, 4096, 4096), (7, 16, 16))
    size = Size(
        tokens=tokens,
        width=width,
        active=active,
        cells=job.cells,
        expansion=4,
        dtype=forms.dtype_for(job.module, context),
        gated=False,
    )
    problem = draw(size, target)
    pairs = sorted_pairs(problem.block_ids, size.num_blocks)
    h = torch.empty(len(pairs.rows), job.cells, dtype=size.dtype, device=target).normal_()
    calls: dict[str, Callable[[], Any]]
    if job.module == forms.FUSED:
        gates = torch.rand(len(pairs.rows), device=target)
        x, dy, f = problem.x, problem.dy, size.activation
        # A product may return several results: take one that depends on the whole product.
        calls = {
            "up_activated": lambda: fused.up_activated(x, problem.keys, pairs, gates, f)[1],
            "down_backward_activated": lambda: fused.down_backward_activated(
                dy, problem.values, pairs, h, gates, f
            )[1],
        }
    else:
        module = forms.modules()[job.module]
        calls = {
            "to_pairs": lambda: module.to_pairs(problem.x, problem.keys, pairs),
            "to_rows": lambda: module.to_rows(h, problem.values, pairs, tokens),
            "to_table": lambda: module.to_table(h, problem.dy, pairs),
        }

    def call() -> Any:
        # The cached records of the pairs may depend on the tiles.
        pairs.derived.clear()
        return calls[job.product]()

    return call


def card() -> str:
    """The name of this device in the keys of `TILES`."""
    return device.name(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
