"""Measures one sparse layer, ours and Megatron's, in the same processes.

Inputs: the sizes of a layer, on every rank of a process group. Outputs: for each contender its
times, forward and backward, and the bytes that its forward pass sends.

Design notes:
- Megatron's layer is its unmodified `MoELayer`, with its own `TopKRouter`, dispatchers and
  `SequentialMLP`. It gets our tables and our gate, and nothing is timed before outputs and input
  gradients agree.
- The unit is a dense FFN of the same k active cells in plain torch, on the same tokens.
- Contenders take turns (A B C A B C ...), so that other load on the machine affects all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor, nn

from benchmarks.parallel import wire
from megatron_sffn.nn import comm_volume
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

DISPATCHERS = ("alltoall", "allgather")
TOLERANCE = 1e-4
"""Largest difference of outputs and input gradients in fp32, relative to the largest value."""
CELL_SECONDS = 20.0
"""Seconds after which a block size is not repeated, but not before the fewest repeats."""
FEWEST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of one rank at one block size.

    Args:
        sffn: the config of the layer.
        chosen: the dispatcher that `comm_volume.cheapest_dispatcher` chooses.
        disagreement: largest difference from our first layer, relative; above `TOLERANCE` there are
            no times.
        seconds: contender -> seconds of a step, one per repeat.
        sent: contender -> bytes that this rank's forward pass sent, as the collectives count them.
        reported: our contender -> the same, as the layer counts it.
        closed_form: contender -> expected bytes per token.
    """

    sffn: SparseFFNConfig
    chosen: str
    disagreement: float
    seconds: Mapping[str, list[float]]
    sent: Mapping[str, int]
    reported: Mapping[str, int]
    closed_form: Mapping[str, float]


def name_of(owner: str, dispatcher: str) -> str:
    """The name of a contender; `owner` is "ours" or "Megatron"."""
    return f"{owner} {dispatcher}"


class Dense(nn.Module):
    """`gelu(x Kᵀ) V` with k cells: the unit."""

    def __init__(self, config: SparseFFNTransformerConfig, cells: int) -> None:
        super().__init__()
        shape = (cells, config.hidden_size)
        device = torch.cuda.current_device()
        self.keys = nn.Parameter(torch.randn(shape, device=device) * config.init_method_std)
        self.values = nn.Parameter(torch.randn(shape, device=device) * config.init_method_std)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """`[T, 1, D]` to the same."""
        return F.gelu(F.linear(x, self.keys)) @ self.values, None


class Transport(nn.Module):
    """An all-to-all of some rows and nothing else: the cost of the bare exchange, one way."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """`[T, 1, D]` to `[rows, 1, D]`."""
        return all_to_all(torch.distributed.group.WORLD, x[: self.rows]), None


def config_of(
    sffn: SparseFFNConfig, hidden_size: int, dispatcher: str
) -> SparseFFNTransformerConfig:
    """Megatron's config of both layers, with expert parallelism over all ranks."""
    return SparseFFNTransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=1,
        add_bias_linear=False,
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        sffn=sffn,
    )


def megatron_layer(config: SparseFFNTransformerConfig, our_layer: SparseFFN) -> MoELayer:
    """Megatron's unmodified layer with our weights."""
    linear = LocalSpecProvider()
    submodules = MLPSubmodules(
        linear_fc1=linear.column_parallel_linear(), linear_fc2=linear.row_parallel_linear()
    )
    experts = partial(SequentialMLP, submodules=submodules)
    layer = MoELayer(config, MoESubmodules(experts=experts), layer_number=1)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(our_layer.router.weight)
        keys, _ = our_layer.experts()
        assert keys is not None
        for block, mlp in enumerate(layer.experts.local_experts):
            mlp.linear_fc1.weight.copy_(keys[block])
            # Megatron's second linear maps G cells to D: its weight is [D, G].
            mlp.linear_fc2.weight.copy_(our_layer.experts.values[block].T)
    return layer


def sparse_layers(sffn: SparseFFNConfig, hidden_size: int) -> dict[str, Any]:
    """Our and Megatron's layers with each dispatcher, all with the same weights."""
    layers: dict[str, Any] = {}
    for dispatcher in DISPATCHERS:
        config = config_of(sffn, hidden_size, dispatcher)
        our_layer = SparseFFN(config, layer_number=1)
        first = layers.setdefault(name_of("ours", DISPATCHERS[0]), our_layer)
        our_layer.load_state_dict(first.state_dict())
        layers[name_of("ours", dispatcher)] = our_layer
        layers[name_of("Megatron", dispatcher)] = megatron_layer(config, our_layer)
    return layers


def measure(sffn: SparseFFNConfig, *, hidden_size: int, tokens: int, repeats: int) -> Measured:
    """Measure all contenders at one block size; a collective call.

    Args:
        sffn: the layer.
        hidden_size: D.
        tokens: T, on each rank.
        repeats: the most repeats; fewer if a round takes long.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    draw = torch.Generator().manual_seed(rank)
    x, dy = torch.randn(2, tokens, 1, hidden_size, generator=draw).to(torch.cuda.current_device())
    layers = sparse_layers(sffn, hidden_size)
    disagreement = _agreed_max(disagreement_of(layers, x, dy))
    seconds: dict[str, list[float]] = {}
    if disagreement <= TOLERANCE:
        unit = Dense(config_of(sffn, hidden_size, DISPATCHERS[0]), sffn.active_cells)
        bare = {"rows": Transport(tokens // ranks * ranks), "row": Transport(ranks)}
        seconds = alternate({"dense": unit, **layers, **bare}, x, dy, repeats)
    sent, reported = {}, {}
    for name, layer in layers.items():
        sent[name], layer_bytes = bytes_of(layer, x)
        if layer_bytes is not None:
            reported[name] = layer_bytes
    layout = ParallelLayout(
        ep=ranks,
        dtype=x.dtype,
        comm_backend=torch.distributed.get_backend(),
    )
    measured = Measured(
        sffn=sffn,
        chosen=comm_volume.cheapest_dispatcher(sffn, hidden_size, layout),
        disagreement=disagreement,
        seconds=seconds,
        sent=sent,
        reported=reported,
        closed_form=closed_form(sffn, hidden_size, layout),
    )
    if rank == 0:
        _report(measured, ranks)
    return measured


def step(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    y, _ = module(x)
    y.backward(dy[: len(y)])
    assert x.grad is not None
    return y.detach(), x.grad


def disagreement_of(layers: Mapping[str, nn.Module], x: Tensor, dy: Tensor) -> float:
    """Largest difference of any layer's output or input gradient from the first layer's."""
    results = [step(layer, x, dy) for layer in layers.values()]
    first_result, largest = results[0], 0.0
    for result in results[1:]:
        for actual, reference in zip(result, first_result, strict=True):
            error = (actual - reference).abs().max() / reference.abs().max()
            # Every comparison with NaN is false, but NaN has to count as wrong.
            largest = max(largest, float(error.nan_to_num(nan=float("inf"))))
    return largest


def alternate(
    modules: Mapping[str, nn.Module], x: Tensor, dy: Tensor, repeats: int
) -> dict[str, list[float]]:
    """Time a step of each module in turns, after one round to warm up and one to plan."""

    def turn() -> dict[str, float]:
        return {name: timed(module, x, dy) for name, module in modules.items()}

    turn()
    round_seconds = _agreed_max(sum(turn().values()))
    affordable = max(FEWEST_REPEATS, int(CELL_SECONDS / round_seconds))
    turns = [turn() for _ in range(min(repeats, affordable))]
    return {name: [seconds_of[name] for seconds_of in turns] for name in modules}


def timed(module: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Seconds of one step that all ranks begin together."""
    module.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    start = time.perf_counter()
    step(module, x, dy)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bytes_of(layer: Any, x: Tensor) -> tuple[int, int | None]:
    """Bytes that a forward pass sends from this rank, by the collectives and by our layer."""
    layer.eval()
    with torch.no_grad(), wire.counted() as sent:
        layer(x)
    layer.train()
    return sent.total, layer.traffic.take()[1] if isinstance(layer, SparseFFN) else None


def closed_form(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> dict[str, float]:
    """Expected bytes per token of each sparse contender's forward pass."""
    forms = {
        "ours": comm_volume.exchanged_bytes_per_token,
        "Megatron": comm_volume.megatron_bytes_per_token,
    }
    return {
        name_of(owner, dispatcher): form(sffn, hidden_size, replace(layout, dispatcher=dispatcher))
        for owner, form in forms.items()
        for dispatcher in DISPATCHERS
    }


def _agreed_max(value: float) -> float:
    """The largest value over all ranks, so that all ranks decide alike."""
    maximum = torch.tensor([value], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX)
    return float(maximum)


def _report(measured: Measured, ranks: int) -> None:
    """Print one line of progress."""
    repeats = len(measured.seconds.get("dense", ()))
    print(
        f"{ranks} ranks, g = {measured.sffn.block_size}: layers differ by "
        f"{measured.disagreement:.0e}, {repeats} repeats",
        file=sys.stderr,
        flush=True,
    )
