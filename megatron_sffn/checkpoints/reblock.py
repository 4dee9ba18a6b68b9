"""Plans another block size for the sparse layers of a checkpoint: how each tensor changes.

Inputs: a checkpoint's metadata and arguments, and the new block size g'. Outputs: the tensors that
change and how, the new arguments, and an account that lists every tensor. No model is built.

Design notes:
- A checkpoint stores keys and values as rows of cells, not of blocks, so another block size leaves
  them unchanged. Only two kinds of tensors change: a gate, which has a row for every block, and the
  values if the gate is a softmax over blocks.
- Splitting a block into r = g/g' parts repeats its row of the gate r times. Under a softmax each
  part then gets 1/r of the block's probability, so the values are multiplied by r; under a sigmoid
  each part keeps the block's gate. In both cases the layer computes the same function. Joining r
  blocks averages their rows of the gate, and divides the values by r.
- The optimizer's moments follow their tensor. A weight that is multiplied by r has a gradient that
  is divided by r, and each of r equal rows gets 1/r of the gradient of the row that they replace.
  So splitting and joining again restores the moments.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from megatron_sffn.checkpoints.files import COMMON_STATE
from megatron_sffn.checkpoints.rewrite import Change
from megatron_sffn.flags.sffn_flags import saved_config
from megatron_sffn.nn.config import Backend, RouterConfig, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import layer_pattern
from megatron_sffn.nn.transformer_config import moe_fields
from megatron_sffn.utils.errors import ConfigError

KEY = re.compile(
    r"(?:optimizer\.state\.(?P<state>\w+)\.)?"
    r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?P<table>experts\.\w+|router\.[\w.]+)"
)
"""The name of a tensor of a sparse layer, or of the optimizer's state for it."""

ORDER = {"": 0, "fp32_param": 0, "param": 0, "exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}
"""Optimizer state -> the power of the gradient in it; 0 for weights and copies of weights."""

BIAS = "router.balance.expert_bias"
PRICES = "router.balance.qb_beta"
PER_BLOCK_BUFFERS = (BIAS, PRICES)
"""Buffers with a number for each block, which a checkpoint has if their method of balance is on."""
L1_COEFFICIENT = "router.balance.l1_coefficient"


@dataclass(frozen=True, kw_only=True)
class Reblocking:
    """The plan for another block size.

    Args:
        before: the layer's config in the checkpoint.
        after: the config with the new block size and the same cells.
        args: the new arguments of the checkpoint.
        changes: name of a tensor -> its change.
        account: (kind of tensor, change in words) -> number of tensors; it counts every entry of
            the checkpoint.
    """

    before: SparseFFNConfig
    after: SparseFFNConfig
    args: Namespace
    changes: dict[str, Change]
    account: Counter[tuple[str, str]]

    @property
    def consequences(self) -> list[str]:
        """A sentence about the change of the model's loss for each router."""
        return [self._consequence(router) for router in self.before.routers]

    def _consequence(self, router: RouterConfig) -> str:
        if router.per_block_weights and self.after.block_size < self.before.block_size:
            shared = "share its probability and the values grow by as much"
            gate = shared if router.splitting_divides_gates else "have its gate"
            return (
                f"{router.name}: the parts of a block {gate}; the layer computes the same "
                "function, up to rounding"
            )
        if router.per_block_weights:
            return (
                f"{router.name}: the gate's rows of blocks that join are averaged; the loss "
                "changes, the less the more alike these blocks were"
            )
        if router.needs_token_ids:
            return (
                f"{router.name}: the hash draws other blocks for every token; the loss jumps, and "
                "the memory has to be learned again"
            )
        return (
            f"{router.name}: the memory is the same, but the choice is among other blocks; the "
            "loss may change"
        )


def plan_reblocking(metadata: Metadata, saved: Namespace, block_size: int) -> Reblocking:
    """Plan another block size.

    Args:
        metadata: the checkpoint's metadata.
        saved: its arguments.
        block_size: g'.

    Raises:
        ConfigError: if this block size is impossible, or a tensor is unknown.
    """
    before = saved_config(saved)
    if before is None:
        raise ConfigError(
            "--sffn-router dense has no blocks to cut anew; give a checkpoint with sparse layers"
        )
    after = _other_blocks(before, block_size)
    _check(before, after, saved.hidden_size)
    rules = _Rules(before, after, saved)
    account: Counter[tuple[str, str]] = Counter()
    changes: dict[str, Change] = {}
    for key, entry in metadata.state_dict_metadata.items():
        kind, effect, change = rules.of(key, entry)
        account[kind, effect] += 1
        if change is not None:
            changes[key] = change
    rules.check_complete()
    return Reblocking(
        before=before,
        after=after,
        args=_new_args(saved, after),
        changes=changes,
        account=account,
    )


def _other_blocks(before: SparseFFNConfig, block_size: int) -> SparseFFNConfig:
    """The config with another block size and the same number of shared cells."""
    if not before.shared_blocks:
        return dataclasses.replace(before, block_size=block_size)
    if block_size < 1 or before.shared_cells % block_size:
        raise ConfigError(
            f"--block-size {block_size} does not divide the {before.shared_cells} cells of the "
            f"checkpoint's {before.shared_blocks} shared blocks; give one that does"
        )
    shared = before.shared_cells // block_size
    return dataclasses.replace(before, block_size=block_size, shared_blocks=shared)


def _check(before: SparseFFNConfig, after: SparseFFNConfig, hidden_size: int) -> None:
    """Raise if there is no rule for this change of the block size."""
    old, new = before.block_size, after.block_size
    if old == new:
        raise ConfigError(f"--block-size {new} is that of the checkpoint; give another")
    if before.backend is Backend.MEGATRON:
        raise ConfigError(
            "the checkpoint was saved with --sffn-backend megatron, whose experts are stored one "
            "by one, not as a memory of cells; train with another --sffn-backend to cut it anew"
        )
    for router in before.routers:
        width = before.router_width(hidden_size)
        if reason := router.bound_to_blocks(before, after, width):
            raise ConfigError(
                f"--block-size {new} does not fit the checkpoint's {old}: {reason}; train with "
                "that --sffn-block-size from the start"
            )
        if router.per_block_weights and max(old, new) % min(old, new):
            raise ConfigError(
                f"--block-size {new} neither divides the checkpoint's {old} nor is a multiple of "
                f"it, so the gate's rows of --sffn-router {router.name} cannot be shared out; give "
                "one that does"
            )


def _new_args(saved: Namespace, after: SparseFFNConfig) -> Namespace:
    """The arguments as a run with the new block size would have saved them."""
    fields = moe_fields(after)
    fields["num_experts"] = fields.pop("num_moe_experts")
    fields["sffn_block_size"] = after.block_size
    fields["sffn_shared_blocks"] = after.shared_blocks
    if "sffn_command" in vars(saved):
        # argparse takes the last value of a flag.
        new_flags = ["--sffn-block-size", str(after.block_size)]
        if after.shared_blocks:
            new_flags += ["--sffn-shared-blocks", str(after.shared_blocks)]
        fields["sffn_command"] = [*saved.sffn_command, *new_flags]
    return Namespace(**{**vars(saved), **fields})


class _Rules:
    """The rule for each tensor of a checkpoint.

    Args:
        before: the layer's config in the checkpoint.
        after: the config with the new block size.
        saved: the checkpoint's arguments.
    """

    def __init__(self, before: SparseFFNConfig, after: SparseFFNConfig, saved: Namespace) -> None:
        hybrid = vars(saved).get("hybrid_layer_pattern")
        pattern = layer_pattern(saved.sffn_layers, saved.num_layers, hybrid)
        layers = [layer for layer, is_sparse in enumerate(pattern) if is_sparse]
        self.layers = {
            layer: _LayerRules(
                before.of_layer(index), after, saved, has_table=index % before.layers_per_table == 0
            )
            for index, layer in enumerate(layers)
        }
        self.changes_tensors = any(rules.changes_tensors for rules in self.layers.values())

    def of(self, key: str, entry: Any) -> tuple[str, str, Change | None]:
        """The kind of an entry, its change in words, and its change.

        Raises:
            ConfigError: if the entry belongs to a sparse layer and is unknown.
        """
        if key == COMMON_STATE:
            return "common state", "the same, with the new block size in its arguments", None
        if not re.search(r"\.mlp\.(router|experts)\.", key):
            if self.changes_tensors and ".optimizer.distributed." in f".{key}":
                raise ConfigError(
                    "the optimizer's state was saved with --no-dist-ckpt-optim-fully-reshardable, "
                    "as buffers of many tensors that cannot be cut; save the checkpoint again "
                    "without this flag"
                )
            tensor = isinstance(entry, TensorStorageMetadata)
            return "other tensors" if tensor else "objects", "the same", None
        match = KEY.fullmatch(key)
        if match is None or not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(_unknown(key, "is not one that this tool knows"))
        state, table, layer = match["state"] or "", match["table"], int(match["layer"])
        if state not in ORDER or layer not in self.layers:
            raise ConfigError(_unknown(key, "is not one that this tool knows"))
        effect, change = self.layers[layer].of(key, table, state, entry)
        kind = f"{table.split('.')[1]}{f', {state}' if state else ''}"
        return (f"gate {kind}" if table.startswith("router.") else kind), effect, change

    def check_complete(self) -> None:
        """Check that the checkpoint had every tensor of its sparse layers.

        Raises:
            ConfigError: with the first tensor that is missing.
        """
        for layer, rules in self.layers.items():
            for table in sorted(rules.missing):
                raise ConfigError(
                    _unknown(f"decoder.layers.{layer}.mlp.{table}", "is missing in the checkpoint")
                )


class _LayerRules:
    """The rules of one sparse layer, and its tensors that are still missing.

    Args:
        before: the layer's config in the checkpoint.
        after: the config with the new block size.
        saved: the checkpoint's arguments.
        has_table: False if the layer reads the table of an earlier one.
    """

    def __init__(
        self,
        before: SparseFFNConfig,
        after: SparseFFNConfig,
        saved: Namespace,
        *,
        has_table: bool,
    ) -> None:
        self.before, self.after = before, after
        self.hidden_size: int = saved.hidden_size
        self.parts_per_block = Fraction(before.block_size, after.block_size)
        router = before.router
        self.per_block = [f"router.{name}" for name in router.per_block_weights]
        self.changes_tensors = bool(self.per_block) or router.splitting_divides_gates
        self.shapes = self._shapes(saved) if has_table else self._router_shapes()
        self.missing = set(self.shapes) - {*PER_BLOCK_BUFFERS, L1_COEFFICIENT}

    def _shapes(self, saved: Namespace) -> dict[str, list[int]]:
        """Tensor of a sparse layer -> its shape in the checkpoint."""
        before = self.before
        key_width = before.key_width(self.hidden_size)
        keys = ["gate_keys", "keys"] if saved.swiglu or saved.quick_geglu else ["keys"]
        return {
            **{f"experts.{name}": [before.num_cells, key_width] for name in keys if key_width},
            "experts.values": [before.num_cells, before.row_width(self.hidden_size)],
            **self._router_shapes(),
        }

    def _router_shapes(self) -> dict[str, list[int]]:
        """Tensor of the layer's router -> its shape in the checkpoint."""
        before = self.before
        weights = before.router.weights(before, before.router_width(self.hidden_size))
        return {
            **{f"router.{name}": list(shape) for name, shape in weights.items()},
            **{name: [before.num_blocks] for name in PER_BLOCK_BUFFERS},
            L1_COEFFICIENT: [1],
        }

    def of(
        self, key: str, table: str, state: str, entry: TensorStorageMetadata
    ) -> tuple[str, Change | None]:
        """The change of a tensor, in words and as a function.

        Args:
            key: name of the tensor in the checkpoint.
            table: its name in the layer.
            state: the optimizer's state that it is, as in `ORDER`.
            entry: what the checkpoint says of it.

        Raises:
            ConfigError: if it is unknown, or has another shape or other pieces.
        """
        self._check_shape(key, table, list(entry.size))
        if table in (*self.per_block, *PER_BLOCK_BUFFERS):
            self._check_pieces(key, entry)
        if not state:
            self.missing.discard(table)
        return self._change(table, ORDER[state])

    def _check_shape(self, key: str, table: str, shape: list[int]) -> None:
        if table not in self.shapes:
            raise ConfigError(_unknown(key, "is not one that this tool knows"))
        if shape != self.shapes[table]:
            raise ConfigError(
                _unknown(
                    key, f"has shape {shape} instead of the {self.shapes[table]} of its arguments"
                )
            )

    def _check_pieces(self, key: str, entry: TensorStorageMetadata) -> None:
        """Raise if rows that are averaged were saved in different pieces."""
        joined = self.parts_per_block.denominator
        for chunk in entry.chunks:
            if chunk.offsets[0] % joined or chunk.sizes[0] % joined:
                raise ConfigError(
                    _unknown(key, f"was saved in pieces that are no multiple of {joined} rows")
                )

    def _change(self, table: str, order: int) -> tuple[str, Change | None]:
        """The change of a tensor, in words and as a function.

        Args:
            table: name of the tensor in its layer.
            order: power of the gradient in it, as in `ORDER`.
        """
        parts = self.parts_per_block
        cells, shared = self.before.num_cells, self.before.router.splitting_divides_gates
        if table == "experts.values" and shared:
            factor = parts if order == 0 else parts**-order
            change = Change(piece=partial(_scaled, float(factor)), rows=(cells, cells))
            return _times(factor), change
        if table not in (*self.per_block, *PER_BLOCK_BUFFERS):
            return "the same", None
        # The expert bias is added to the gates, so it scales as they do. The prices of quantile
        # balancing are in units of scores, which parts of a block keep.
        factor = parts ** -(int(shared) if table == BIAS else order)
        rows = (self.before.num_blocks, self.after.num_blocks)
        change = Change(piece=partial(_repeat_or_average, parts, float(factor)), rows=rows)
        effect = f"each row {parts} times" if parts > 1 else f"mean of each {1 / parts} rows"
        return effect if factor == 1 else f"{effect}, {_times(factor)}", change


def _unknown(key: str, reason: str) -> str:
    return f"tensor {key} {reason}; nothing was written, since it could not be cut without a guess"


def _times(factor: Fraction) -> str:
    """A factor in words."""
    return f"times {factor}" if factor > 1 else f"divided by {1 / factor}"


def _scaled(factor: float, table: Tensor) -> Tensor:
    """`table · factor`, computed in float64.

    Raises:
        ConfigError: if a number leaves the range of its dtype.
    """
    scaled = (table.double() * factor).to(table.dtype)
    if bool((table.isfinite() & ~scaled.isfinite()).any()):
        raise ConfigError(
            f"{table.abs().max().item():.4g} times {factor:g} is beyond the range of "
            f"{table.dtype}; convert a checkpoint of another precision"
        )
    return scaled


def _repeat_or_average(parts: Fraction, factor: float, rows: Tensor) -> Tensor:
    """Repeat rows for the parts of a block, or average those of joined blocks; then scale them."""
    if parts > 1:
        return _scaled(factor, rows.repeat_interleave(int(parts), dim=0))
    joined = rows.double().unflatten(0, (-1, int(1 / parts))).mean(dim=1)
    return (joined * factor).to(rows.dtype)
