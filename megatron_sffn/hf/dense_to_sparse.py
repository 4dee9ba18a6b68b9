"""Turns the FFNs of a dense model into sparse layers, without training.

Inputs: the tensors of a dense checkpoint, every layer by itself. Outputs: those of a model with
sparse layers.

Two forms:
- memory: the cells of the FFN become the M cells of the memory, in their order, so that M is the
  FFN's width F. The router has no weights of its own and no gate, so with k = M every block is
  active and the layer computes the function of the FFN; with a smaller k it computes a part of it.
- copies (upcycling, arXiv 2212.05055 and 2410.07524): the memory holds C copies of the FFN, each in
  G = F/g blocks, and the gate network is new. The blocks of a copy share a row of the gate, so that
  a token chooses whole copies, n = k/F of them.

Design notes: Megatron's upcycling multiplies the weights of both linear layers by a root of the
factor that the gates need; here the values alone are multiplied by all of it, which is exact for
every activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_sffn.hf.settings import Settings
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers.gates import is_normalized
from megatron_sffn.nn.routers.learned import LearnedConfig
from megatron_sffn.nn.routers.rand_hash import RandHashConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DenseToSparse:
    """How dense layers become sparse ones.

    Args:
        router: value of `--sffn-router`.
        block_size: g; None for the width of the FFN, with copies only.
        active_cells: k; None for the width of the FFN.
        layers: value of `--sffn-layers`.
        copies: C; None for the form of a memory.
    """

    router: str
    block_size: int | None = None
    active_cells: int | None = None
    layers: str = "every:1"
    copies: int | None = None

    def flags(self, dense: Settings) -> list[str]:
        """The flags of the sparse layers, to follow those of the dense model.

        Args:
            dense: settings of the dense model.

        Raises:
            ConfigError: if the model is not dense, or the numbers do not fit its width.
        """
        if dense.sffn is not None:
            raise ConfigError(
                f"--sffn-router {self.router} makes a dense model sparse, but this one has sparse "
                "layers; import it without the flag, and cut its blocks anew with "
                "megatron-sffn convert-checkpoint reblock"
            )
        if dense.dense_activation != dense.activation:
            raise ConfigError(
                "the dense FFNs compute GELU by tanh, as Megatron's fusion with the bias does, and "
                "cells do not; give a model with --disable-bias-linear or --no-bias-gelu-fusion"
            )
        width = int(dense.args.ffn_hidden_size)
        active = width if self.active_cells is None else self.active_cells
        size = self.block_size
        if size is None:
            if self.copies is None:
                raise ConfigError(
                    f"--sffn-router {self.router} needs --sffn-block-size g; give a divisor of the "
                    f"FFN's {width} cells"
                )
            size = width
        if self.copies is None:
            expansion = _memory_expansion(width, active)
        else:
            expansion = _copies_expansion(width, active, size, self.copies)
        words = ("--sffn-router", self.router, "--sffn-layers", self.layers)
        numbers = ("--sffn-block-size", size, "--sffn-active-cells", active)
        return [str(word) for word in (*words, *numbers, "--sffn-expansion", expansion)]


def _memory_expansion(width: int, active: int) -> int:
    """E of a memory of `width` cells."""
    if active > width:
        raise ConfigError(
            f"--sffn-active-cells {active} is more than the FFN's {width} cells; give at most "
            "these, or --upcycle C for copies of the FFN"
        )
    if active < 1 or width % active:
        below = max((k for k in range(1, max(active, 2)) if width % k == 0), default=1)
        above = min(k for k in range(max(active, 1), width + 1) if width % k == 0)
        raise ConfigError(
            f"--sffn-active-cells {active} does not divide the FFN's {width} cells; the nearest "
            f"that do are {below} and {above}"
        )
    return width // active


def _copies_expansion(width: int, active: int, size: int, copies: int) -> int:
    """E of a memory of copies."""
    if copies < 2:
        raise ConfigError(f"--upcycle {copies} makes no copies; give at least 2")
    if size < 1 or width % size:
        raise ConfigError(
            f"--sffn-block-size {size} does not divide the FFN's {width} cells; give a divisor"
        )
    if active % width or active < width:
        raise ConfigError(
            f"--sffn-active-cells {active} is no multiple of the FFN's {width} cells, of which a "
            "token chooses whole copies; give one"
        )
    if copies % (active // width):
        raise ConfigError(
            f"--upcycle {copies} is no multiple of the {active // width} copies that "
            f"--sffn-active-cells {active} lets a token choose; give one"
        )
    return copies * width // active


def check(how: DenseToSparse, sparse: Settings) -> str:
    """Refuse a router that does not start from the dense model, and say how exact it is.

    Args:
        how: the form.
        sparse: settings of the model with sparse layers.

    Returns:
        A sentence.

    Raises:
        ConfigError: if the router does not fit the form.
    """
    sffn = sparse.sffn
    assert sffn is not None
    if sffn.layers_per_table > 1:
        raise ConfigError(
            f"--sffn-layers-per-table {sffn.layers_per_table} gives several layers one table, and "
            "each FFN of the dense model has cells of its own; leave it out"
        )
    cells = int(sparse.args.ffn_hidden_size) * (how.copies or 1)
    if sffn.num_cells != cells:
        raise ConfigError(
            f"the flags of the sparse layers describe {sffn.num_cells} cells, but the FFN gives "
            f"{cells}; leave out --sffn-expansion, which follows from --sffn-active-cells"
        )
    if how.copies is None:
        return _check_memory(how, sffn, sparse)
    return _check_copies(how, sffn)


def _gate(sffn: SparseFFNConfig) -> str:
    gate = sffn.router.gate if isinstance(sffn.router, ScoredConfig) else None
    return gate or "none"


def _check_memory(how: DenseToSparse, sffn: SparseFFNConfig, sparse: Settings) -> str:
    has_weights = bool(sffn.router.weights(sffn, sparse.args.hidden_size))
    if has_weights or _gate(sffn) != "none" or sffn.shared_blocks:
        reason = "weights of its own" if has_weights else f"--sffn-gate {_gate(sffn)}"
        reason = "--sffn-shared-blocks" if sffn.shared_blocks else reason
        raise ConfigError(
            f"--sffn-router {how.router} has {reason}, which the dense model does not have; use "
            "avg-k or vanilla-m, or --upcycle C for copies of the FFN behind a new gate"
        )
    if sffn.num_active_blocks == sffn.num_blocks:
        return "all blocks are active, so that the model computes the function of the dense one"
    return (
        f"{sffn.active_cells} of {sffn.num_cells} cells are active, so that the model computes a "
        "part of the dense one's function; megatron-sffn eval says what it costs"
    )


def _check_copies(how: DenseToSparse, sffn: SparseFFNConfig) -> str:
    router, parts = sffn.router, _parts(how, sffn)
    if router.stores_blocks:
        raise ConfigError(
            f"--upcycle {how.copies} makes no balanced map, for which a run counts ids when it "
            "starts without a checkpoint (--sffn-hash-balance); leave that flag out"
        )
    is_linear = isinstance(router, LearnedConfig) and router.network == "linear"
    is_hash = isinstance(router, RandHashConfig) and parts == 1
    if sffn.shared_blocks or not (is_linear or is_hash):
        raise ConfigError(
            f"--upcycle {how.copies} needs a router that chooses whole copies, which --sffn-router "
            f"{how.router} with these flags does not; use softmax-after, or another with a linear "
            "gate network, or rand-hash with blocks of a whole FFN, and no shared blocks"
        )
    if _gate(sffn) == "relu":
        raise ConfigError(
            f"--upcycle {how.copies} starts with scores near 0, where the gates of --sffn-gate "
            f"relu (--sffn-router {how.router}) are 0 and no copy computes; use softmax-after"
        )
    if _gate(sffn) == "none" or is_normalized(_gate(sffn)):
        return (
            "the gates of the copies of a cell add up to the same for every token, so that the "
            "model computes the function of the dense one"
        )
    return (
        f"the values are scaled for gates (--sffn-gate {_gate(sffn)}) of scores near 0, so that "
        "the model starts near the function of the dense one, not at it; softmax-after starts at it"
    )


def _parts(how: DenseToSparse, sffn: SparseFFNConfig) -> int:
    """G, blocks of one copy."""
    assert how.copies is not None
    return sffn.num_blocks // how.copies


def convert(tensors: dict[str, Tensor], how: DenseToSparse, sparse: Settings) -> dict[str, Tensor]:
    """The tensors of the model with sparse layers, without those of its routers.

    Args:
        tensors: of the dense model, every layer by itself.
        how: the form.
        sparse: settings of the model with sparse layers.

    Raises:
        ConfigError: if a dense FFN has biases.
    """
    assert sparse.sffn is not None
    converted = dict(tensors)
    scale = _scale(how, sparse.sffn) / (sparse.args.moe_router_topk_scaling_factor or 1.0)
    for layer in sparse.sparse_layers:
        mlp = f"decoder.layers.{layer}.mlp"
        for name in (f"{mlp}.linear_fc1.bias", f"{mlp}.linear_fc2.bias"):
            bias = converted.pop(name, None)
            if bias is not None and bias.any():
                raise ConfigError(
                    f"{name} is not zero, and memory cells have no biases; give a model trained "
                    "with --disable-bias-linear"
                )
        first = converted.pop(f"{mlp}.linear_fc1.weight")
        values = converted.pop(f"{mlp}.linear_fc2.weight").T * scale
        tables = {"keys": first, "values": values}
        if sparse.gated:
            gate_keys, keys = first.chunk(2)
            tables = {"gate_keys": gate_keys, "keys": keys, "values": values}
        for name, table in tables.items():
            converted[f"{mlp}.experts.{name}"] = table.repeat(how.copies or 1, 1)
    return converted


def _scale(how: DenseToSparse, sffn: SparseFFNConfig) -> float:
    """Factor of the values, such that the gates of the copies of a cell add up to 1."""
    if how.copies is None:
        return 1.0
    parts = _parts(how, sffn)
    chosen = sffn.num_active_blocks // parts
    gate = _gate(sffn)
    if is_normalized(gate):
        return float(parts)
    return {
        "none": 1 / chosen,
        "softmax": sffn.num_blocks / chosen,
        "sigmoid": 2 / chosen,
        "sqrt-softplus": 1 / (chosen * math.sqrt(math.log(2))),
    }[gate]


def shared_rows(gate: Tensor, how: DenseToSparse) -> Tensor:
    """New rows of a gate `[B, D]`, in which the blocks of a copy have the same row."""
    copies = how.copies or len(gate)
    return gate[:copies].repeat_interleave(len(gate) // copies, dim=0)
