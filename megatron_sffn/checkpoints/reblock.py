"""Another block size for a trained memory: what becomes of each tensor of its checkpoint.

Enters: a checkpoint's metadata and arguments, and the new block size g'. Leaves: the tensors that
change and how, the new arguments, and an account in which every tensor occurs. No model is built.

Choices
- A memory is stored as cells, so another block size cuts nothing: tables stay as they are. Only a
  gate network, which has a row for every block, is cut anew, and the values behind a softmax.
- With r = g/g' parts of a block, a gate repeats its rows r times. Under a softmax the r parts share
  the block's probability, p/r each, so the values grow by r; under a sigmoid each part has the
  block's gate. Either way the layer computes the same function. The other way, the rows of r blocks
  are averaged, and the values shrink by r.
- The optimizer's moments follow: a gradient scales inversely to its weight, and r equal rows get a
  part of the gradient each. So there and back again restores them.
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
from megatron_sffn.nn.config import Backend, SparseFFNConfig, moe_fields
from megatron_sffn.nn.layer_spec import layer_pattern
from megatron_sffn.utils.errors import ConfigError

KEY = re.compile(
    r"(?:optimizer\.state\.(?P<state>\w+)\.)?"
    r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?P<table>experts\.\w+|router\.[\w.]+)"
)
"""A tensor of a sparse layer, or the optimizer's state of it."""

ORDER = {"": 0, "fp32_param": 0, "param": 0, "exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}
"""Optimizer state -> the power of the gradient in it; weights, and copies of them, have none."""

BIAS = "router.balance.expert_bias"


@dataclass(frozen=True, kw_only=True)
class Reblocking:
    """What to do.

    Args:
        before: the layer.
        after: the same memory in other blocks.
        args: the new arguments of the checkpoint.
        changes: tensors that change.
        account: (kind of tensor, what happens) -> how many; every entry of the checkpoint counts.
    """

    before: SparseFFNConfig
    after: SparseFFNConfig
    args: Namespace
    changes: dict[str, Change]
    account: Counter[tuple[str, str]]

    @property
    def consequence(self) -> str:
        """What the model's loss does, in one sentence."""
        router = self.before.router
        if router.per_block_weights and self.after.block_size < self.before.block_size:
            shared = "share its probability and the values grow by as much"
            gate = shared if router.softmax_over_blocks else "have its gate"
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
        metadata: of the checkpoint.
        saved: its arguments.
        block_size: g'.

    Raises:
        ConfigError: if the memory cannot be cut so, or a tensor is not understood.
    """
    before = saved_config(saved)
    if before is None:
        raise ConfigError(
            "--sffn-router dense has no blocks to cut anew; give a checkpoint with sparse layers"
        )
    after = _other_blocks(before, block_size)
    _check(before, after)
    cut = _Cut(before, after, saved)
    account: Counter[tuple[str, str]] = Counter()
    changes: dict[str, Change] = {}
    for key, entry in metadata.state_dict_metadata.items():
        kind, what, change = cut.of(key, entry)
        account[kind, what] += 1
        if change is not None:
            changes[key] = change
    cut.check_complete()
    return Reblocking(
        before=before,
        after=after,
        args=_new_args(saved, after),
        changes=changes,
        account=account,
    )


def _other_blocks(before: SparseFFNConfig, block_size: int) -> SparseFFNConfig:
    """The layer with blocks of another size, as many of its cells shared as before."""
    if not before.shared_blocks:
        return dataclasses.replace(before, block_size=block_size)
    if block_size < 1 or before.shared_cells % block_size:
        raise ConfigError(
            f"--block-size {block_size} does not divide the {before.shared_cells} cells of the "
            f"checkpoint's {before.shared_blocks} shared blocks; give one that does"
        )
    shared = before.shared_cells // block_size
    return dataclasses.replace(before, block_size=block_size, shared_blocks=shared)


def _check(before: SparseFFNConfig, after: SparseFFNConfig) -> None:
    """There is a rule for this change."""
    old, new = before.block_size, after.block_size
    if old == new:
        raise ConfigError(f"--block-size {new} is that of the checkpoint; give another")
    if before.backend is Backend.MEGATRON:
        raise ConfigError(
            "the checkpoint was saved with --sffn-backend megatron, whose experts are stored one "
            "by one, not as a memory of cells; train with another --sffn-backend to cut it anew"
        )
    if before.router.per_block_weights and max(old, new) % min(old, new):
        raise ConfigError(
            f"--block-size {new} neither divides the checkpoint's {old} nor is a multiple of it, "
            f"so the gate's rows of --sffn-router {before.router.name} cannot be shared out; give "
            "one that does"
        )


def _new_args(saved: Namespace, after: SparseFFNConfig) -> Namespace:
    """The arguments as a run with the new block size would have saved them."""
    fields = moe_fields(after)
    fields["num_experts"] = fields.pop("num_moe_experts")
    fields["sffn_block_size"] = after.block_size
    fields["sffn_shared_blocks"] = after.shared_blocks
    if "sffn_command" in vars(saved):
        # The last one counts.
        again = ["--sffn-block-size", str(after.block_size)]
        if after.shared_blocks:
            again += ["--sffn-shared-blocks", str(after.shared_blocks)]
        fields["sffn_command"] = [*saved.sffn_command, *again]
    return Namespace(**{**vars(saved), **fields})


class _Cut:
    """The rule for each tensor, and what it has met.

    Args:
        before: the layer.
        after: the same memory in other blocks.
        saved: the checkpoint's arguments.
    """

    def __init__(self, before: SparseFFNConfig, after: SparseFFNConfig, saved: Namespace) -> None:
        self.before, self.after = before, after
        self.width: int = saved.hidden_size
        self.parts = Fraction(before.block_size, after.block_size)
        router = before.router
        self.rows = [f"router.{name}" for name in router.per_block_weights]
        self.gated = bool(self.rows) or router.softmax_over_blocks
        self.shapes = self._shapes(saved)
        pattern = layer_pattern(saved.sffn_layers, saved.num_layers)
        self.sparse = [layer for layer, sparse in enumerate(pattern) if sparse]
        self.expected = {
            (layer, table) for layer in self.sparse for table in self.shapes if table != BIAS
        }

    def _shapes(self, saved: Namespace) -> dict[str, list[int]]:
        """Table of a sparse layer -> its shape in the checkpoint."""
        before, router = self.before, self.before.router
        key_width = router.key_width(self.width)
        keys = ["gate_keys", "keys"] if saved.swiglu else ["keys"]
        weights = router.weights(before, self.width)
        return {
            **{f"experts.{name}": [before.num_cells, key_width] for name in keys if key_width},
            "experts.values": [before.num_cells, self.width],
            **{f"router.{name}": list(shape) for name, shape in weights.items()},
            BIAS: [before.num_blocks],
        }

    def of(self, key: str, entry: Any) -> tuple[str, str, Change | None]:
        """Kind, what happens, and how, of one entry.

        Raises:
            ConfigError: if it belongs to a sparse layer and is not understood.
        """
        if key == COMMON_STATE:
            return "common state", "the same, with the new block size in its arguments", None
        if not re.search(r"\.mlp\.(router|experts)\.", key):
            if self.gated and ".optimizer.distributed." in f".{key}":
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
        if state not in ORDER or layer not in self.sparse:
            raise ConfigError(_unknown(key, "is not one that this tool knows"))
        self._check_shape(key, table, list(entry.size))
        if table in (*self.rows, BIAS):
            self._check_pieces(key, entry)
        if not state:
            self.expected.discard((layer, table))
        kind = f"{table.split('.')[1]}{f', {state}' if state else ''}"
        what, change = self._change(table, ORDER[state])
        return (f"gate {kind}" if table.startswith("router.") else kind), what, change

    def _check_shape(self, key: str, table: str, shape: list[int]) -> None:
        # What describes a block otherwise, a descriptor of Avg-K's, has no rule.
        if table not in self.shapes or table.startswith("router.descriptor."):
            raise ConfigError(_unknown(key, "is not one that this tool knows"))
        if shape != self.shapes[table]:
            raise ConfigError(
                _unknown(
                    key, f"has shape {shape} instead of the {self.shapes[table]} of its arguments"
                )
            )

    def _check_pieces(self, key: str, entry: TensorStorageMetadata) -> None:
        """Rows that are to be joined lie in one piece."""
        joined = self.parts.denominator
        for chunk in entry.chunks:
            if chunk.offsets[0] % joined or chunk.sizes[0] % joined:
                raise ConfigError(
                    _unknown(key, f"was saved in pieces that are no multiple of {joined} rows")
                )

    def _change(self, table: str, order: int) -> tuple[str, Change | None]:
        """What happens to a table, and how; `order` as in `ORDER`."""
        cells, shared = self.before.num_cells, self.before.router.softmax_over_blocks
        if table == "experts.values" and shared:
            factor = self.parts if order == 0 else self.parts**-order
            change = Change(piece=partial(_scaled, float(factor)), rows=(cells, cells))
            return _times(factor), change
        if table not in (*self.rows, BIAS):
            return "the same", None
        # The bias is in units of the gate.
        factor = self.parts ** -(int(shared) if table == BIAS else order)
        rows = (self.before.num_blocks, self.after.num_blocks)
        change = Change(piece=partial(_recut, self.parts, float(factor)), rows=rows)
        how = (
            f"each row {self.parts} times"
            if self.parts > 1
            else f"mean of each {1 / self.parts} rows"
        )
        return how if factor == 1 else f"{how}, {_times(factor)}", change

    def check_complete(self) -> None:
        """Every tensor that the arguments promise was there.

        Raises:
            ConfigError: naming one that was not.
        """
        for layer, table in sorted(self.expected):
            raise ConfigError(
                _unknown(f"decoder.layers.{layer}.mlp.{table}", "is missing in the checkpoint")
            )


def _unknown(key: str, why: str) -> str:
    return f"tensor {key} {why}; nothing was written, since it could not be cut without a guess"


def _times(factor: Fraction) -> str:
    """A factor in words."""
    return f"times {factor}" if factor > 1 else f"divided by {1 / factor}"


def _scaled(factor: float, table: Tensor) -> Tensor:
    """`table · factor`, computed in float64.

    Raises:
        ConfigError: if a number leaves the range of its dtype.
    """
    after = (table.double() * factor).to(table.dtype)
    if bool((table.isfinite() & ~after.isfinite()).any()):
        raise ConfigError(
            f"{table.abs().max().item():.4g} times {factor:g} is beyond the range of "
            f"{table.dtype}; convert a checkpoint of another precision"
        )
    return after


def _recut(parts: Fraction, factor: float, rows: Tensor) -> Tensor:
    """Rows of blocks -> rows of their parts, or of the blocks that they join to."""
    if parts > 1:
        return _scaled(factor, rows.repeat_interleave(int(parts), dim=0))
    joined = rows.double().unflatten(0, (-1, int(1 / parts))).mean(dim=1)
    return (joined * factor).to(rows.dtype)
