"""Our layer agrees with Megatron's MoE layer, with its own router, dispatcher and experts.

Where our layer differs, by design:
- `--sffn-gate sigmoid` is sigma-MoE's, whose scores do not compete: Megatron divides the sigmoids
  of the K chosen experts by their sum, and takes the same shares of all sigmoids for its balance
  losses, where our layer takes the softmax.
- With a limited capacity, our layer compares 8 bits of a probability and takes the first of equal
  tokens (`--moe-token-drop-policy probs`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed.finalize_model_grads import (
    _update_router_qb_beta,
    reset_model_temporary_tensors,
)
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tests.parity.compare import assert_same, outcome, sffn_outcome
from tests.support.router_cases import FLOAT64, Case, D, build, copy_tables, draw, inputs

pytestmark = pytest.mark.usefixtures("one_rank")

FP32 = 5e-6
"""Relative tolerance: Megatron's probabilities are in fp32, whatever the dtype of the layer is."""

SOFTMAX_FIRST = {"moe_router_pre_softmax": True}


def megatron_layer(layer: Any, **fields: Any) -> MoELayer:
    """Megatron's unmodified layer with the weights of our layer.

    Args:
        layer: ours, with SwiGLU blocks.
        fields: of Megatron's config.
    """
    sffn = layer.router.sffn
    linear = LocalSpecProvider()
    mlp = MLPSubmodules(
        linear_fc1=linear.column_parallel_linear(), linear_fc2=linear.row_parallel_linear()
    )
    config = TransformerConfig(
        num_layers=2,
        hidden_size=D,
        num_attention_heads=2,
        add_bias_linear=False,
        activation_func=F.silu,
        gated_linear_unit=True,
        num_moe_experts=sffn.num_blocks,
        moe_router_topk=sffn.num_active_blocks,
        moe_ffn_hidden_size=sffn.block_size,
        moe_shared_expert_intermediate_size=sffn.shared_cells or None,
        **FLOAT64,
        **{"moe_router_load_balancing_type": "none", **fields},
    )
    reference = MoELayer(
        config,
        MoESubmodules(
            experts=partial(SequentialMLP, submodules=mlp),
            shared_experts=partial(SharedExpertMLP, submodules=mlp),
        ),
    )
    reference.set_layer_number(1)
    copy_tables(layer, reference)
    with torch.no_grad():
        reference.router.weight.copy_(layer.router.weight)
        if sffn.shared_blocks:
            reference.shared_experts.load_state_dict(layer.shared_experts.state_dict())
    return reference


def megatron_outcome(layer: MoELayer) -> dict[str, Tensor]:
    """`outcome` of Megatron's layer, in our layout of weights."""
    mlps = layer.experts.local_experts

    def gradients() -> dict[str, Tensor | None]:
        return {
            "keys": torch.stack([mlp.linear_fc1.weight.grad for mlp in mlps]),
            "values": torch.stack([mlp.linear_fc2.weight.grad.T for mlp in mlps]),
            "weight": layer.router.weight.grad,
        }

    return outcome(lambda x: layer(x)[0], gradients)


def sffn_layer(
    gate: str, balance: dict[str, Any] | None = None, *, g: int = 4, shared: int = 0
) -> Any:
    """Our layer with Switch's gate network and Megatron's flags of load balancing."""
    router = "switch" if gate.startswith("softmax") else "sigma-moe"
    flags = {"moe_router_load_balancing_type": "none", **(balance or {})}
    return build(
        Case(
            router=router,
            block_size=g,
            swiglu=True,
            options=(("gate", gate),),
            megatron=tuple(flags.items()),
            sffn=(("shared_blocks", shared),),
        )
    )


BALANCE: dict[str, dict[str, Any]] = {
    "one loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5},
    "three losses and z": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.5, 0.25, 0.125],
        "moe_z_loss_coeff": 0.1,
    },
}


@pytest.mark.parametrize("balance", BALANCE)
@pytest.mark.parametrize(
    ("gate", "fields"), [("softmax", SOFTMAX_FIRST), ("softmax-chosen", {})], ids=["first", "after"]
)
def test_softmax_before_or_after_the_choice_and_balance_losses_agree(
    gate: str, fields: dict[str, Any], balance: str
) -> None:
    layer = sffn_layer(gate, BALANCE[balance])
    reference = megatron_layer(layer, **fields, **BALANCE[balance])
    # Two microbatches: the global loss counts the tokens of both, and gradients add up.
    for _ in range(2):
        assert_same(sffn_outcome(layer), megatron_outcome(reference), tolerance=FP32)


# Megatron gives this warning about a call of its own.
@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
def test_shared_experts_and_groups_of_experts_agree() -> None:
    # 12 groups of one block would be no limit; of 3 groups of 4 the best two hold all 2 blocks.
    groups = {"moe_router_num_groups": 3, "moe_router_group_topk": 2}
    layer = sffn_layer("softmax-chosen", groups, shared=2)
    reference = megatron_layer(layer, **groups)
    assert_same(sffn_outcome(layer), megatron_outcome(reference), tolerance=FP32)
    for name, weight in layer.shared_experts.named_parameters():
        grad = dict(reference.shared_experts.named_parameters())[name].grad
        torch.testing.assert_close(weight.grad, grad, rtol=FP32, atol=FP32)


def test_the_bias_of_experts_acts_on_the_choice_alone() -> None:
    flags = {"moe_router_enable_expert_bias": True}
    layer = sffn_layer("sigmoid", flags, g=16)
    reference = megatron_layer(layer, **flags, moe_router_score_function="sigmoid")
    plain = sffn_outcome(layer)["output"]
    layer.zero_grad()
    for router in (layer.router.balance, reference.router):
        router.local_tokens_per_expert.zero_()
        router.expert_bias.copy_(torch.tensor([-0.4, 0.3, 0.1]))
    actual = sffn_outcome(layer)
    assert_same(actual, megatron_outcome(reference), tolerance=FP32)
    assert (actual["output"] - plain).abs().max() > 0.01
    counts = layer.router.balance.local_tokens_per_expert
    assert torch.equal(counts, reference.router.local_tokens_per_expert)


@pytest.mark.parametrize(
    ("gate", "fields"),
    [("softmax-chosen", {}), ("sigmoid-chosen", {"moe_router_score_function": "sigmoid"})],
    ids=["softmax", "sigmoid"],
)
def test_quantile_balancing_agrees_step_by_step(gate: str, fields: dict[str, Any]) -> None:
    flags = {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_quantile_balancing_ema": 0.5,
    }
    layer = sffn_layer(gate, flags)
    reference = megatron_layer(layer, **flags, **fields)
    world, outputs = torch.distributed.group.WORLD, []
    for _ in range(3):
        for module in (layer, reference):
            module.zero_grad()
        actual = sffn_outcome(layer)
        assert_same(actual, megatron_outcome(reference), tolerance=FP32)
        outputs.append(actual["output"])
        for module in (layer, reference):
            _update_router_qb_beta([module], module.config, world)
            reset_model_temporary_tensors(module.config, [module])
        prices = layer.router.balance.qb_beta
        torch.testing.assert_close(prices, reference.router.qb_beta, rtol=FP32, atol=FP32)
    # Prices have changed the choice.
    assert (outputs[1] - outputs[0]).abs().max() > 0.01


SCORE_FUNCTIONS = {"sigmoid-chosen": "sigmoid", "sqrt-softplus-chosen": "sqrtsoftplus"}
"""Our gate -> Megatron's score function, which divides by the sum over the chosen experts."""


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gate", SCORE_FUNCTIONS)
def test_normalized_and_scaled_gates_agree(gate: str, biased: bool) -> None:
    flags = {"moe_router_topk_scaling_factor": 2.5, "moe_router_enable_expert_bias": biased}
    layer = sffn_layer(gate, flags)
    reference = megatron_layer(layer, **flags, moe_router_score_function=SCORE_FUNCTIONS[gate])
    if biased:
        for router in (layer.router.balance, reference.router):
            router.local_tokens_per_expert.zero_()
            router.expert_bias.copy_(torch.linspace(-0.4, 0.4, len(router.expert_bias)))
    assert_same(sffn_outcome(layer), megatron_outcome(reference), tolerance=FP32)


def test_sigmoid_scores_do_not_compete_where_megatrons_are_divided_by_their_sum() -> None:
    layer = sffn_layer("sigmoid")
    reference = megatron_layer(layer, moe_router_score_function="sigmoid")
    hidden, _, _ = inputs()
    scores = (hidden.flatten(0, 1) @ layer.router.weight.T).sigmoid()
    total = scores.topk(4, dim=1).values.sum(dim=1).view(*hidden.shape[:2], 1)
    y, _ = layer(hidden)
    torch.testing.assert_close(y / total, reference(hidden)[0], rtol=FP32, atol=FP32)
    assert total.min() < 0.95 * total.max()


@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_capacity_drops_the_least_probable_tokens_of_a_full_expert(factor: float) -> None:
    flags = {"moe_expert_capacity_factor": factor, "moe_token_drop_policy": "probs"}
    layer = sffn_layer("softmax", flags)
    with torch.no_grad():
        # Wide scores: no two probabilities of a block that decide agree in 8 bits.
        layer.router.weight.copy_(3 * draw(7, 12, D))
    reference = megatron_layer(
        layer,
        **SOFTMAX_FIRST,
        **flags,
        moe_router_load_balancing_type="aux_loss",
        moe_token_dispatcher_type="alltoall",
    )
    actual = sffn_outcome(layer)
    assert_same(actual, megatron_outcome(reference), tolerance=FP32)
    # With a negative capacity, Megatron's "no limit", none is dropped.
    plain = sffn_layer("softmax")
    plain.load_state_dict(layer.state_dict())
    dropped = (actual["output"] - sffn_outcome(plain)["output"]).abs().max()
    assert (dropped > 0.01) == (factor > 0)
