"""The contenders: modules that compute a sparse feed-forward layer with given routing.

Inputs: a `Problem`: tokens, tables, and the blocks of each token. Outputs: modules that map `[T,
D]` to `[T, D]`, each with its own copy of the tables in its own layout.

Design notes:
- A peer is code of an installed package, called as its models call it. Only its router is replaced,
  by one that returns the given routing.
- Megatron runs with its allgather dispatcher: on one rank it permutes tokens once, while its
  all-to-all dispatcher permutes them twice. Its experts are those of its own spec: grouped with
  Transformer Engine, else one by one.
- Megatron and transformers always multiply by a token's gates; without gates they get ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.blocks.problem import Problem
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import op


class Dense(nn.Module):
    """`f(x Kᵀ) V` with k cells in plain torch, which is the unit of all ratios."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        active = problem.block_ids.shape[1]
        self.activation = problem.activation
        # The gate keys of all blocks come first, as in a gated dense FFN.
        halves = problem.keys[:active].chunk(2 if self.activation.gated else 1, dim=1)
        self.keys = _parameter(torch.cat([keys_of_half.flatten(0, 1) for keys_of_half in halves]))
        self.values = _parameter(problem.values[:active].flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to the same."""
        return self.activation(F.linear(x, self.keys)) @ self.values


class Sparse(nn.Module):
    """A contender whose result is checked, with the tables in our layout."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.keys = _parameter(problem.keys)
        self.values = _parameter(problem.values)
        self.gates = None if problem.gates is None else _parameter(problem.gates)
        self.block_ids, self.activation = problem.block_ids, problem.activation

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of tables and gates after a backward pass, in the problem's shapes."""
        grads = {"keys": self.keys.grad, "values": self.values.grad}
        if self.gates is not None:
            grads["gates"] = self.gates.grad
        return {name: grad for name, grad in grads.items() if grad is not None}


class BlockFFN(Sparse):
    """Our `block_ffn` with one of its backends."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__(problem)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to the same."""
        return op.block_ffn(
            x,
            self.keys,
            self.values,
            self.block_ids,
            self.gates,
            activation=self.activation,
            backend=self.backend,
        )


class GroupedMM(Sparse):
    """Only `torch._grouped_mm`: gather, product, activation, product, scatter."""

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to the same."""
        blocks, order = self.block_ids.flatten().sort(stable=True)
        rows = order // self.block_ids.shape[1]
        counts = torch.bincount(blocks, minlength=len(self.values))
        offsets = counts.cumsum(0, dtype=torch.int32)
        ups = torch._grouped_mm(x[rows], self.keys.transpose(1, 2), offs=offsets)
        h = self.activation(ups)
        if self.gates is not None:
            h = h * self.gates.flatten()[order, None]
        return torch.zeros_like(x).index_add(
            0, rows, torch._grouped_mm(h, self.values, offs=offsets)
        )


TRANSFORMERS_ACTIVATIONS = {
    Activation.GELU: "gelu",
    Activation.RELU: "relu",
    Activation.SQUARED_RELU: "relu2",
    Activation.SWIGLU: "silu",
    Activation.QUICK_GEGLU: "quick_gelu",
}
"""Activation -> its name in transformers; of a gated one the name of the gate's activation."""


class Transformers(nn.Module):
    """transformers' experts with `experts_implementation="grouped_mm"`, in Mixtral's layout.

    `use_experts_implementation` is the switch that its models use; it calls
    `grouped_mm_experts_forward`.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        from transformers.activations import ACT2FN
        from transformers.integrations.moe import use_experts_implementation

        gated = problem.activation.gated

        class Experts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.num_experts = problem.num_blocks
                self.act_fn = ACT2FN[TRANSFORMERS_ACTIVATIONS[problem.activation]]
                self.register_parameter(
                    "gate_up_proj" if gated else "up_proj", _parameter(problem.keys)
                )
                self.down_proj = _parameter(problem.values.transpose(1, 2))

            def forward(self, *args: Any) -> Tensor:
                raise AssertionError("the eager form of experts")

        self.experts = use_experts_implementation(Experts, has_gate=gated)(
            SimpleNamespace(_experts_implementation="grouped_mm")
        )
        self.block_ids = problem.block_ids
        self.gates = _gates(problem)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to the same."""
        y: Tensor = self.experts(x, self.block_ids, self.gates)
        return y

    def gradients(self) -> dict[str, Tensor]:
        """As `Sparse.gradients`."""
        parameters = dict(self.experts.named_parameters())
        down_grad = parameters.pop("down_proj").grad
        (up_proj,) = parameters.values()
        assert up_proj.grad is not None and down_grad is not None
        grads = {"keys": up_proj.grad, "values": down_grad.transpose(1, 2)}
        return grads if self.gates.grad is None else {**grads, "gates": self.gates.grad}


class Megatron(nn.Module):
    """megatron-core's `MoELayer`: dispatch, experts and combine, with a router of given routing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        from megatron.core.models.backends import get_backend
        from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

        spec = get_backend("transformer_engine" if has_transformer_engine() else "local")
        self.layer = MoELayer(
            megatron_config(problem),
            MoESubmodules(
                experts=spec.grouped_mlp_modules(moe_use_grouped_gemm=True),
                router=lambda **_: GivenRouter(problem),
            ),
            layer_number=1,
        )
        with torch.no_grad():
            for (fc1, fc2), keys, values in zip(
                self.linears(), problem.keys, problem.values, strict=True
            ):
                fc1.copy_(keys)
                # Megatron's second linear maps G cells to D: its weight is [D, G].
                fc2.copy_(values.T)

    def linears(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The weights of the two linear layers of every expert."""
        experts = self.layer.experts
        if hasattr(experts, "local_experts"):
            return [
                (expert.linear_fc1.weight, expert.linear_fc2.weight)
                for expert in experts.local_experts
            ]
        return [
            (getattr(experts.linear_fc1, name), getattr(experts.linear_fc2, name))
            for name in map("weight{}".format, range(experts.num_local_experts))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to the same."""
        y: Tensor = self.layer(x[:, None])[0]
        return y[:, 0]

    def gradients(self) -> dict[str, Tensor]:
        """As `Sparse.gradients`."""

        def stacked(weights: tuple[nn.Parameter, ...]) -> Tensor:
            return torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])

        fc1, fc2 = zip(*self.linears(), strict=True)
        grads = {"keys": stacked(fc1), "values": stacked(fc2).transpose(1, 2)}
        router = self.layer.router
        if router.probabilities.grad is not None:
            grads["gates"] = router.probabilities.grad.gather(1, router.block_ids)
        return grads


class GivenRouter(nn.Module):
    """Megatron's `RouterInterface` that returns a given routing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.block_ids = problem.block_ids
        zeros = problem.x.new_zeros(len(problem.x), problem.num_blocks)
        gates = problem.ones_or_gates
        self.probabilities = nn.Parameter(
            zeros.scatter(1, self.block_ids, gates), requires_grad=problem.gates is not None
        )
        self.routing_map = zeros.bool().scatter(1, self.block_ids, True)

    def set_layer_number(self, layer_number: int) -> None:
        """Do nothing: the routing does not depend on the layer."""

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and mask, `[T, B]` both."""
        return self.probabilities, self.routing_map


def megatron_config(problem: Problem) -> Any:
    """Megatron's config of one layer, with the fusions that its training enables by itself."""
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    functions: dict[Activation, Callable[..., Tensor]] = {
        Activation.GELU: F.gelu,
        Activation.RELU: F.relu,
        Activation.SQUARED_RELU: squared_relu,
        Activation.SWIGLU: F.silu,
        Activation.QUICK_GEGLU: quick_gelu,
    }
    gated, dtype = problem.activation.gated, problem.x.dtype
    return TransformerConfig(
        num_layers=1,
        hidden_size=problem.x.shape[1],
        num_attention_heads=1,
        add_bias_linear=False,
        gated_linear_unit=gated,
        activation_func=functions[problem.activation],
        bias_activation_fusion=gated and problem.x.is_cuda,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        perform_initialization=False,
        num_moe_experts=problem.num_blocks,
        moe_router_topk=problem.block_ids.shape[1],
        moe_ffn_hidden_size=problem.values.shape[1],
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=has_transformer_engine(),
        moe_permute_fusion=has_transformer_engine(),
    )


def has_transformer_engine() -> bool:
    """True if Megatron can import Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def peers() -> dict[str, Callable[[Problem], nn.Module]]:
    """Name -> the module of a peer for a problem. Building or running it may fail with a reason."""
    experts = "TEGroupedMLP" if has_transformer_engine() else "SequentialMLP"
    return {
        f"Megatron {experts}": Megatron,
        "transformers grouped_mm": Transformers,
        "torch _grouped_mm": GroupedMM,
    }


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format))


def _gates(problem: Problem) -> nn.Parameter:
    gates = problem.ones_or_gates.clone()
    return nn.Parameter(gates, requires_grad=problem.gates is not None)
