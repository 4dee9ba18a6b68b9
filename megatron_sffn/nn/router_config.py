"""What a router declares about itself: settings that are flags, and closed forms of its costs.

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

    from megatron_sffn.nn.config import SparseFFNConfig, SparseFFNTransformerConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout
    from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes


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
) -> Any:
    """A config field that is also a command-line flag.

    Args:
        name: as typed, `--sffn-...`.
        help: one line for `--help`.
        default: of the field and the flag; a bool makes an on-switch.
        kind: of a value, where the default is None.
        choices: the values it can take.
        least: the smallest value.
        most: the largest value.
        training_only: whether a trained model is the same whatever the value is.
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
        },
    )


@dataclass(frozen=True, kw_only=True)
class RouterTestNumbers:
    """Small numbers for which a router is defined; tests and benchmarks read them.

    Args:
        options: fields of the router's config that make it small and deterministic.
        single_cells: whether the router is defined for blocks of one cell only.
        square_memory: whether the number of cells M must be a square.
        gated_activation: whether the router is defined for gated activations such as SwiGLU.
        flags: flags of a small training run.
        paper_flags: flags of the regularisation with which the router's paper trains it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    single_cells: bool = False
    square_memory: bool = False
    gated_activation: bool = True
    flags: str = ""
    paper_flags: str = ""

    def layer(self, *, active_cells: int, block_size: int, expansion: int) -> dict[str, int]:
        """Numbers of a layer (fields of `SparseFFNConfig`) close to the given ones."""
        return {
            "active_cells": active_cells,
            "block_size": 1 if self.single_cells else block_size,
            # E = k makes M = k².
            "expansion": active_cells if self.square_memory else expansion,
        }


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What one selection method needs beyond the layer's numbers; a base for `routers/*.py`."""

    name: ClassVar[str]
    """Value of `--sffn-router`."""
    summary: ClassVar[str]
    """One line for `--help`."""
    needs_token_ids: ClassVar[bool] = False
    """Whether the router reads the input ids."""
    megatron_flags: ClassVar[tuple[str, ...]] = ()
    """Megatron's MoE flags (dest) that act on this router, beside those of every layer."""
    per_block_weights: ClassVar[tuple[str, ...]] = ()
    """Its weights that have a row for every block."""
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
        """The method is defined for a layer of these numbers.

        Raises:
            ConfigError: if it is not, with the nearest numbers for which it is.
        """

    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        """The method is defined in a model of this config.

        Raises:
            ConfigError: if it is not.
        """

    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        """Why no gradient would ever reach the router's own weights in a model of this config.

        Returns:
            The reason and its remedy, as the end of a sentence; None if gradients reach all weights
            that act, or the router has none.
        """
        return None

    def remark(self, sffn: SparseFFNConfig) -> str | None:
        """What a user should know of a layer of these numbers before it trains, if anything."""
        return None

    @property
    def gated_output(self) -> bool:
        """Whether a factor per (token, block) multiplies the output, and travels with it."""
        return False

    @property
    def softmax_over_blocks(self) -> bool:
        """Whether the gates of equal blocks add up to that of one: a softmax, not a sigmoid."""
        return False

    def key_width(self, hidden_size: int) -> int:
        """Numbers of a cell's key: D, or fewer; 0 where the router gives coefficients."""
        return hidden_size

    def build(self) -> Callable[..., torch.nn.Module]:
        """The router's class, to be called with Megatron's `RouterBuilder` arguments."""
        raise NotImplementedError(f"{type(self).__name__} has no router")

    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """The router's own weights in one layer: name -> shape."""
        return {}

    def parameters(self, sffn: SparseFFNConfig, hidden_size: int) -> int:
        """Parameters of the router of one layer."""
        return sum(map(math.prod, self.weights(sffn, hidden_size).values()))

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """Forward FLOPs of the selection per token and layer (one multiply-add is 2).

        Args:
            sffn: the layer.
            hidden_size: D.
            gated: whether a cell has a gate key and an up key (SwiGLU).
        """
        return 0

    def held_bytes(self, sffn: SparseFFNConfig, hidden_size: int, vocab_size: int | None) -> int:
        """Bytes that the router of one layer holds on each rank beside its weights.

        Args:
            sffn: the layer.
            hidden_size: D.
            vocab_size: rows of the embedding; None where they are not known.
        """
        return 0

    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        """What the router keeps for the backward pass of one microbatch on one rank.

        The queries, which are the rows that meet the keys, are counted by the layer.

        Raises:
            NotImplementedError: if the router does not say; nothing is ever counted as zero then.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula for saved_bytes")

    def exchanged_bytes(
        self, sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
    ) -> float:
        """Bytes between ranks that the selection costs per token and layer, beside the exchange."""
        return 0.0


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    """A flag's value is one that it can take."""
    name, choices = item.metadata["flag"], item.metadata["choices"]
    least, most = item.metadata["least"], item.metadata["most"]
    if choices and value not in choices:
        raise ConfigError(f"{name} {value} is unknown; choose from {', '.join(choices)}")
    low, high = least is not None and value < least, most is not None and value > most
    if low or high or (isinstance(value, float) and not math.isfinite(value)):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        kind = "a finite number" if isinstance(value, float) else "a number"
        raise ConfigError(f"{name} {value} is out of range; give {kind} {allowed}")
