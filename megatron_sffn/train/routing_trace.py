"""Records the blocks of every evaluated token in a file for `tools/analyze_routing.py`.

Inputs: the validation batches of an evaluation on one rank, and the routings of every router for
them. Outputs: an `.npz` file with the id of each token, and for each sparse layer its blocks.

Design notes:
- Recording uses forward hooks on the routers, which are registered only with
  `--sffn-record-routing`, so that it adds nothing to training.
- The blocks of a token are stored in ascending order, in the smallest integers that can hold B.
  This halves the file, and no measure depends on the order. -1 is a place that stayed empty.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.utils.errors import ConfigError

BLOCKS_OF = "blocks_of_layer_"
"""Prefix of an array's name in the file; the layer's number follows."""


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Tokens and their blocks.

    Args:
        token_ids: `[T]`.
        blocks: layer, counted from 1 -> block ids `[T, K]`.
        num_blocks: B.
    """

    token_ids: numpy.ndarray
    blocks: Mapping[int, numpy.ndarray]
    num_blocks: int

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        arrays = {f"{BLOCKS_OF}{layer}": blocks for layer, blocks in self.blocks.items()}
        try:
            with temporary.open("wb") as file:
                numpy.savez_compressed(
                    file,
                    token_ids=self.token_ids,
                    num_blocks=numpy.array(self.num_blocks),
                    **arrays,  # type: ignore[arg-type]  # numpy's stub takes it for a flag
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> RoutingTrace:
        """Read a file that `save` wrote."""
        with numpy.load(path) as stored:
            layers = [name for name in stored.files if name.startswith(BLOCKS_OF)]
            return RoutingTrace(
                token_ids=stored["token_ids"],
                blocks={int(name.removeprefix(BLOCKS_OF)): stored[name] for name in layers},
                num_blocks=int(stored["num_blocks"]),
            )


@dataclass
class RoutingTracer:
    """Records the trace of one evaluation.

    Args:
        path: the file to write.
        num_blocks: B.
    """

    path: Path
    num_blocks: int
    _tokens: list[Tensor] = field(default_factory=list)
    _blocks: dict[int, list[numpy.ndarray]] = field(default_factory=dict)
    _has_hooks: bool = False

    @staticmethod
    def of_args(args: Namespace) -> RoutingTracer | None:
        """The tracer for `--sffn-record-routing`; None without this flag.

        Raises:
            ConfigError: if the run is not the evaluation of a sparse model on one rank.
        """
        path = args.sffn_record_routing
        if path is None:
            return None
        flag = f"--sffn-record-routing {path}"
        if args.num_experts is None:
            raise ConfigError(
                f"{flag} has nothing to record: --sffn-router dense chooses no blocks; leave it out"
            )
        if not args.skip_train:
            raise ConfigError(f"{flag} records an evaluation; add --skip-train and --load")
        if args.world_size > 1:
            raise ConfigError(
                f"{flag} records on one rank, not on {args.world_size}; start one, without "
                "torchrun and without the flags of a layout"
            )
        return RoutingTracer(path=Path(path), num_blocks=args.num_experts)

    def before_forward(self, model: torch.nn.Module, tokens: Tensor) -> None:
        """Called before each microbatch of the evaluation.

        Args:
            model: the model; the first call registers hooks on its routers.
            tokens: `[b, s]`, the input ids.
        """
        if not self._has_hooks:
            self._has_hooks = True
            for layer in sparse_layers(model):
                layer.router.register_forward_hook(partial(self._record, layer.layer_number))
        # The layers see the tokens in the order of [s, b].
        self._tokens.append(tokens.T.flatten().cpu())

    def _record(self, layer: int, module: torch.nn.Module, inputs: Any, routing: Routing) -> None:
        dtype = numpy.int16 if self.num_blocks <= 1 << 15 else numpy.int32
        ids_TK = routing.block_ids.sort(dim=1).values.cpu().numpy().astype(dtype)
        self._blocks.setdefault(layer, []).append(ids_TK)

    def save(self) -> None:
        """Write the file."""
        RoutingTrace(
            token_ids=torch.cat(self._tokens).numpy().astype(numpy.int32),
            blocks={layer: numpy.concatenate(ids) for layer, ids in sorted(self._blocks.items())},
            num_blocks=self.num_blocks,
        ).save(self.path)
