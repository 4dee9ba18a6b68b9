"""Sparse feed-forward layers on Megatron, from one memory cell to a whole expert.

The path of one token, file by file:

    pretrain.py       the entry point; platforms/cpu.py first, where there is no CUDA
    arguments.py      flags become numbers: g, E, k, and from them B blocks of which K are active
    megatron_flags.py what those numbers do to Megatron's own flags
    layout.py         layouts of ranks that cannot work
    checkpoints/      the checkpoint to go on from: whole, and of this model?
    training.py       hands Megatron its model, batches and loss
    data/gpt.py       the token leaves a .bin file as part of a batch
    model.py          the transformer layers it passes, some of them sparse
    initialize.py     their first weights, the same on every layout
    layer.py          in a sparse one: route, dispatch, compute, combine
    routers/          route: which K blocks?          -> Routing
    expert_grid.py      which rank holds which cells of them
    dispatch/         dispatch: to the ranks that hold them, once each, and back   -> Plan
    memory.py         the tables of keys and values that the blocks are made of
    ops/              compute: f(x Kᵀ) V of the chosen blocks
    balance.py        losses and a bias that keep the blocks evenly used
    statistics.py     how they were used: counts of every layer
    routing_log.py    routing.jsonl, TensorBoard, W&B
    results.py        summary.json
    recording.py      which blocks which tokens chose, for analysis/, which draws it
    accounting/       what all of it costs, in closed form
    traffic.py        and what it sends between ranks
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sffn.nn.config import SparseFFNConfig, SparseFFNTransformerConfig
    from megatron_sffn.nn.layer import SparseFFN

__all__ = ["ConfigError", "SparseFFN", "SparseFFNConfig", "SparseFFNTransformerConfig"]

_HOMES = {
    "SparseFFN": "megatron_sffn.nn.layer",
    "SparseFFNConfig": "megatron_sffn.nn.config",
    "SparseFFNTransformerConfig": "megatron_sffn.nn.config",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names when they are asked for: tools need only the light ones."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
