"""Sparse feed-forward layers on Megatron, from one memory cell to a whole expert.

The path of one token, in the order in which it meets the code:

    pretrain.py               the entry point of a run
    patches/                  replaces names of torch and Megatron, before Megatron is imported
    flags/                    turns flags into numbers: g, E, k, and from them B blocks and K active
    checks/                   refuses flags, layouts, data and checkpoints that cannot work
    train/                    gives Megatron's training loop our model, batches, loss and callbacks
    data/loading/             reads the token from a .bin file as part of a batch
    nn/layer_spec.py          puts sparse layers into the chosen transformer layers
    nn/init.py, nn/reinit.py  draw the initial weights, the same on every layout
    nn/layer.py               in a sparse layer: route, dispatch, compute, combine
    nn/latent_projection.py   narrower rows for the blocks, and back (--moe-latent-size)
    nn/routers/               route: which K blocks?                        -> Routing
    nn/load_balancing.py      auxiliary losses, the expert bias, prices of quantile_balancing.py
    nn/expert_grid.py         which rank holds which cells
    nn/dispatch/              dispatch: to the ranks that hold the blocks, and back  -> Plan
    nn/block_weights.py       the tables of keys and values, and shared_tables.py of several layers
    ops/                      compute: f(x Kᵀ) V of the chosen blocks
    nn/routing_counters.py    counts how the blocks were used
    train/                    writes routing.jsonl, TensorBoard scalars and summary.json
    checkpoints/              saves, so that a run can resume, on another layout too

After training, `inference/` makes a model of a checkpoint on any layout, generates and evaluates.

Beside the path: `accounting/` and `nn/comm_volume.py` say in closed form what all of it costs and
sends, `analysis/` draws the routing of a run, `study/` compares runs and reports on studies,
`scaling/` has scaling laws, `doctor/` says whether training can start on a machine,
`nn/standalone.py` is the layer for a plain PyTorch model, `cli.py` is the command `megatron-sffn`,
`utils/` has errors, files and hashes.
`docs/architecture.md` has the pictures, `docs/glossary.md` the words and letters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.layer import SparseFFN
    from megatron_sffn.nn.standalone import StandaloneSparseFFN
    from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

__all__ = [
    "ConfigError",
    "SparseFFN",
    "SparseFFNConfig",
    "SparseFFNTransformerConfig",
    "StandaloneSparseFFN",
]

_HOMES = {
    "SparseFFN": "megatron_sffn.nn.layer",
    "SparseFFNConfig": "megatron_sffn.nn.config",
    "SparseFFNTransformerConfig": "megatron_sffn.nn.transformer_config",
    "StandaloneSparseFFN": "megatron_sffn.nn.standalone",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names when they are asked for: tools need only the light ones."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
