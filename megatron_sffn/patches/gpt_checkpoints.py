"""Megatron's load of a GPT's checkpoint into a hybrid model, for GPTs with sparse layers.

Megatron renames the tensors that a hybrid model asks for. It knows GPTs whose layers are all alike,
of which a checkpoint keeps a weight of all layers as one tensor. A GPT whose layers may be sparse
keeps each layer's weights under the layer's number.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from typing import Any

from megatron_sffn.patches.registry import Patch, apply

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
"""The layer in the name of a tensor of a hybrid model's checkpoint."""

NOT_IN_A_GPT = "output_layer._extra_state"
"""End of the name of an empty entry that a hybrid model's checkpoint has, and a GPT's has not."""


class _NumberedLayers(types.SimpleNamespace):
    """Megatron's `GPTCompatLayerMaps`, for a checkpoint that numbers its layers."""


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


def _pair_sparse_layers(original: Callable[[str], Any]) -> Callable[[str], Any]:
    """Pair a hybrid model's layers with a GPT's, of which some may be sparse."""

    def layer_maps(pattern: str) -> Any:
        # Dense and sparse layers are numbered as one kind, and so are all kinds of attention.
        maps = original(pattern.replace("E", "-").replace("+", "*"))
        return _NumberedLayers(**vars(maps)) if "E" in pattern else maps

    return layer_maps


def _rename_numbered_layers(original: Callable[..., None]) -> Callable[..., None]:
    """Give the tensors that are asked for the names of a GPT that numbers its layers."""

    def retarget(state_dict: Any, layer_maps: Any) -> None:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

        if isinstance(layer_maps, _NumberedLayers):
            dict_list_map_inplace(functools.partial(_renamed, layer_maps), state_dict)
        else:
            original(state_dict, layer_maps)

    return retarget


def _renamed(layer_maps: _NumberedLayers, entry: Any) -> Any:
    """An entry under its name in the GPT's checkpoint; what that does not have keeps its value."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

    if not isinstance(entry, ShardedBase):
        return entry
    layer = LAYER.search(entry.key)
    index = int(layer[1]) if layer else None
    if entry.key.endswith(NOT_IN_A_GPT) or index in layer_maps.fresh_init:
        return LocalNonpersistentObject(entry.data)
    if index is not None:
        number = {**layer_maps.attention_to_gpt, **layer_maps.mlp_to_gpt}[index]
        entry.key = LAYER.sub(f"decoder.layers.{number}.", entry.key)
    entry.key = entry.key.replace("decoder.final_norm.", "decoder.final_layernorm.")
    return entry


PATCHES = (
    Patch(
        target="megatron.core.dist_checkpointing.gpt_checkpoint_interop.gpt_compatible_layer_maps",
        make=_pair_sparse_layers,
        needed_by="megatron.training.checkpointing._maybe_setup_gpt_to_hybrid_load",
        why="a GPT of which only some layers are sparse, or with multi-latent attention, cannot be "
        "loaded into a hybrid model",
        until="Megatron pairs patterns of dense and sparse layers, and of + layers",
    ),
    Patch(
        target="megatron.core.dist_checkpointing.gpt_checkpoint_interop."
        "retarget_sharded_state_dict_to_gpt_checkpoint",
        make=_rename_numbered_layers,
        needed_by="megatron.training.checkpointing.load_checkpoint",
        why="a GPT's checkpoint that numbers its layers cannot be loaded into a hybrid model",
        until="Megatron looks into the checkpoint for the form of its layers' names",
    ),
)
"""Names of Megatron 0.19 that know one form of a GPT's checkpoint."""
