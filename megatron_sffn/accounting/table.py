"""The costs of a model as the text that a run prints when it starts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_sffn.accounting.flops import flops_per_token, overhead_over_dense
from megatron_sffn.accounting.parameters import count_parameters
from megatron_sffn.accounting.sent_bytes import sent_per_token_and_layer
from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.nn.comm_volume import DISPATCHERS, megatron_bytes_per_token

if TYPE_CHECKING:
    from megatron_sffn.nn.parallel_layout import ParallelLayout


def table(shape: ModelShape, layout: ParallelLayout | None = None) -> str:
    """The costs of a model.

    Args:
        shape: shape of the model.
        layout: layout of the run; if blocks are split over several ranks, the bytes sent are shown.
    """
    parameters, sffn = count_parameters(shape), shape.sffn
    title = f"feed-forward: dense, {shape.ffn_hidden_size} cells in {shape.num_layers} layers"
    rows = {
        "parameters": human(parameters.total),
        "active parameters": human(parameters.active),
        "FLOPs per token, forward": human(flops_per_token(shape).total),
        "FLOPs over dense": f"{100 * overhead_over_dense(shape):+.3g} %",
    }
    if sffn is not None:
        per_table = sffn.layers_per_table
        tables = f", one table for {per_table} of them" if per_table > 1 else ""
        shared = f" and {sffn.shared_blocks} shared" if sffn.shared_blocks else ""
        title = (
            f"sparse feed-forward: {_routers(shape)}, {sffn.num_active_blocks} of "
            f"{sffn.num_blocks} blocks of {sffn.block_size} cells{shared} (E = {sffn.expansion}) "
            f"in {shape.sparse_layers} of {shape.num_layers} layers{tables}"
        )
    if sffn is not None and layout is not None and layout.expert_ranks > 1:
        if sffn.backend != "megatron":
            sent = sent_per_token_and_layer(shape, layout)
            rows[f"sent per token and layer, {layout.dispatcher}"] = f"{human(sent)}B"
        for dispatcher in DISPATCHERS:
            sent = megatron_bytes_per_token(
                sffn, shape.hidden_size, dataclasses.replace(layout, dispatcher=dispatcher)
            )
            rows[f"  with Megatron's {dispatcher}"] = f"{human(sent)}B"
    width = max(map(len, rows))
    return "\n".join((title, *(f"  {name:<{width}}  {text:>9}" for name, text in rows.items())))


def _routers(shape: ModelShape) -> str:
    """The name of the router, or of each router with the number of its sparse layers."""
    layers = shape.by_router(0)
    if len(layers) == 1:
        return layers[0].sffn.router.name
    return " and ".join(f"{sffn.router.name} ({count})" for _, sffn, count in layers)


def human(number: float) -> str:
    """A number with a prefix, ready for a unit: 12345678 as `12.3 M`, 512 as `512 `."""
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if number >= 1000**power:
            return f"{number / 1000**power:.1f} {letter}"
    return f"{number:.0f} "
