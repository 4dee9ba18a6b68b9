"""The base of router configs: settings that are flags, and closed forms of a router's costs.

Inputs: the layer's numbers. Outputs: weights, FLOPs and bytes of a router. Each file of `routers/`
has a subclass of `RouterConfig`, so that a new method changes no existing config (axlearn's rule
for config trees) and no file of the accounting or the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout
    from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes
    from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig


def flag(
    name: str,
    *,
    help: str,
    default: Any,
    kind: type | None = None,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    training_only: bool = False,
    value_in_checkpoint: bool = False,
) -> Any:
    """A config field that is also a command-line flag.

    Args:
        name: as typed, `--sffn-...`.
        help: one line for `--help`.
        default: value of the field where the flag is not given; a bool makes an on-switch.
        kind: type of the value, where the default is None.
        choices: the values that are allowed.
        least: the smallest value that is allowed.
        most: the largest value that is allowed.
        training_only: True if the flag acts in training only, so that a trained model does not
            depend on it.
        value_in_checkpoint: True if a checkpoint holds what the value was read for, so that a
            trained model depends on whether the flag is given, not on its value.
    """
    return field(
        default=default,
        metadata={
            "flag": name,
            "help": help,
            "kind": kind or type(default),
            "choices": choices,
            "least": least,
            "most": most,
            "training_only": training_only,
            "value_in_checkpoint": value_in_checkpoint,
        },
    )


@dataclass(frozen=True, kw_only=True)
class RouterTestNumbers:
    """Small numbers for which a router is defined; tests and benchmarks read them.

    Args:
        options: fields of the router's config that make it small and deterministic.
        single_cells: True if the router is defined for blocks of one cell only.
        square_blocks: True if the number of blocks B must be a square.
        gated_activation: True if the router is defined for gated activations such as SwiGLU.
        flags: flags of a small training run.
        paper_flags: flags with which a benchmark of all routers trains it: the regularisation of
            its paper, or what a small number of blocks needs.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    single_cells: bool = False
    square_blocks: bool = False
    gated_activation: bool = True
    flags: str = ""
    paper_flags: str = ""

    def layer(self, *, active_cells: int, block_size: int, expansion: int) -> dict[str, int]:
        """Numbers of a layer (fields of `SparseFFNConfig`) close to the given ones."""
        size = 1 if self.single_cells else block_size
        return {
            "active_cells": active_cells,
            "block_size": size,
            # E = k/g makes B = (k/g)².
            "expansion": active_cells // size if self.square_blocks else expansion,
        }


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Settings and costs of one selection method; the base class of the configs in `routers/`."""

    name: ClassVar[str]
    """Value of `--sffn-router`."""
    summary: ClassVar[str]
    """One line for `--help`."""
    scores_rows: ClassVar[bool] = False
    """True if scores are products with the blocks' keys, so that in a latent layer the router gets
    the rows of L numbers that the blocks read; the functions below then get L for `hidden_size`."""
    needs_token_ids: ClassVar[bool] = False
    """True if the router reads the input ids."""
    megatron_flags: ClassVar[tuple[str, ...]] = ()
    """Megatron's MoE flags (dest) that act on this router, beside those of every layer."""
    per_block_weights: ClassVar[tuple[str, ...]] = ()
    """Names of the router's weights that have a row for every block."""
    balance_coefficient: ClassVar[float] = 0.0
    """Default of `--moe-aux-loss-coeff`."""
    initialization: ClassVar[str] = "megatron"
    """Default of `--sffn-init`."""
    test_numbers: ClassVar[RouterTestNumbers] = RouterTestNumbers()
    """Small numbers for which tests and benchmarks build it."""

    def __post_init__(self) -> None:
        """Check every field that has a closed set or range of values."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                _check_value(item, value)

    def check(self, sffn: SparseFFNConfig) -> None:
        """Check that the method is defined for a layer of these numbers.

        Raises:
            ConfigError: if it is not, with the nearest numbers for which it is.
        """

    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        """Check that the method is defined in a model of this config.

        Raises:
            ConfigError: if it is not.
        """

    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        """The reason why no gradient would reach the router's weights in a model of this config.

        Returns:
            The reason and its remedy, as the end of a sentence; None if gradients reach all weights
            that have an effect, or if the router has no weights.
        """
        return None

    def remark(self, sffn: SparseFFNConfig) -> str | None:
        """A note for the user about a layer of these numbers, printed at the start, or None."""
        return None

    def token_keys(self, ids_bs: torch.Tensor) -> torch.Tensor:
        """The numbers by which the router knows tokens (`needs_token_ids`): their ids, or others.

        Args:
            ids_bs: `[b, s]` input ids of sequences from their start.

        Returns:
            `[b, s]` int64.
        """
        return ids_bs

    @property
    def gated_output(self) -> bool:
        """True if a gate per (token, block) multiplies the output; gates are sent with tokens."""
        return False

    @property
    def stores_blocks(self) -> bool:
        """True if a checkpoint has ids of blocks, so that it is bound to its block size."""
        return False

    @property
    def splitting_divides_gates(self) -> bool:
        """True if splitting a block into r equal blocks divides its gate by r."""
        return False

    def bound_to_blocks(
        self, before: SparseFFNConfig, after: SparseFFNConfig, hidden_size: int
    ) -> str | None:
        """The reason why a checkpoint cannot have another block size, even if it is cut anew.

        Args:
            before: the layer in the checkpoint.
            after: the layer with another block size.
            hidden_size: width of what the router scores.

        Returns:
            The reason, as a sentence without its end; None for weights that fit, or that
            `checkpoints/reblock.py` can cut.
        """
        shapes = self.weights(after, hidden_size)
        for name, shape in self.weights(before, hidden_size).items():
            if name not in self.per_block_weights and shapes[name] != shape:
                return (
                    f"router.{name} of --sffn-router {self.name} has shape {list(shape)}, and "
                    f"{list(shapes[name])} with the other blocks"
                )
        return None

    def key_width(self, hidden_size: int) -> int:
        """Width of a cell's key: D or less; 0 where the router computes the cells' coefficients."""
        return hidden_size

    def router_class(self) -> Callable[..., torch.nn.Module]:
        """The router's class, to be called with Megatron's `RouterBuilder` arguments."""
        raise NotImplementedError(f"{type(self).__name__} has no router")

    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """The router's weights in one layer: name -> shape."""
        return {}

    def parameters(self, sffn: SparseFFNConfig, hidden_size: int) -> int:
        """Parameters of the router of one layer."""
        return sum(map(math.prod, self.weights(sffn, hidden_size).values()))

    def matrix_parameters(self, sffn: SparseFFNConfig, hidden_size: int) -> int:
        """Those of the parameters that are matrices, which Muon trains."""
        shapes = self.weights(sffn, hidden_size).values()
        return sum(math.prod(shape) for shape in shapes if len(shape) == 2)

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """Forward FLOPs of the selection per token and layer (one multiply-add is 2).

        Args:
            sffn: the layer.
            hidden_size: D.
            gated: True if a cell has a gate key and an up key (SwiGLU).
        """
        return 0

    def held_bytes(self, sffn: SparseFFNConfig, hidden_size: int, vocab_size: int | None) -> int:
        """Bytes of the tables that the router of one layer holds on each rank beside its weights.

        Args:
            sffn: the layer.
            hidden_size: D.
            vocab_size: rows of the embedding; None where the number is not known.
        """
        return 0

    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        """Bytes that the router keeps for the backward pass of one microbatch on one rank.

        Its queries are excluded, because the layer counts them as the blocks' input rows.

        Raises:
            NotImplementedError: if the router has no formula, so that it never counts as zero.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula for saved_bytes")

    def exchanged_bytes(
        self, sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
    ) -> float:
        """Bytes that the selection sends per token and layer, beside dispatch and combine."""
        return 0.0


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that the flag does not allow."""
    name, choices = item.metadata["flag"], item.metadata["choices"]
    least, most = item.metadata["least"], item.metadata["most"]
    if choices and value not in choices:
        raise ConfigError(f"{name} {value} is unknown; choose from {', '.join(choices)}")
    low, high = least is not None and value < least, most is not None and value > most
    if low or high or (isinstance(value, float) and not math.isfinite(value)):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        kind = "a finite number" if isinstance(value, float) else "a number"
        raise ConfigError(f"{name} {value} is out of range; give {kind} {allowed}")
