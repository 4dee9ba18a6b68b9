"""Reads the tensors of a checkpoint whole, whatever layout saved them.

Inputs: the folder of an iteration. Outputs: its weights and buffers by the names of the checkpoint,
without the optimizer's state. No model is built and no process group is needed.

Design notes: torch's reader joins the pieces that the ranks saved, so that this module knows
nothing about layouts. Layers that are all alike are one tensor with a leading dimension of layers;
`by_layer` gives every layer a name of its own, as Megatron does for layers that differ.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from megatron_sffn.checkpoints.files import read_metadata

STACKED = re.compile(r"((?:decoder|mtp)\.layers\.)(?!\d)(.+)")
"""The name of a tensor that holds all layers."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all weights and buffers of an iteration.

    Args:
        folder: of the iteration, which is complete (`files.read_whole`).

    Returns:
        Name in the checkpoint -> tensor on the CPU, in the dtype of the checkpoint.
    """
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        # torch warns that there is no process group.
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every layer a name of its own: `decoder.layers.x` becomes `decoder.layers.0.x`, ..."""
    single = {}
    for name, tensor in tensors.items():
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            single[name] = tensor
            continue
        prefix, rest = stacked.groups()
        single |= {f"{prefix}{layer}.{rest}": part for layer, part in enumerate(tensor.unbind(0))}
    return single
