"""Switch (methods S1-S3)."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_sffn.ops import block_ffn
from megatron_sffn.routers.switch import SwitchConfig
from tests.routers.conftest import D

T, B = 24, 6
WHOLE = {"block_size": 8, "expansion": B}  # K = 1


def test_s1_the_output_is_the_probability_times_the_block(build) -> None:
    torch.manual_seed(0)
    router = build(SwitchConfig(), **WHOLE)
    x = torch.randn(T, D).double()
    keys, values = torch.randn(B, 8, D).double(), torch.randn(B, 8, D).double()
    routing = router(x, keys)
    y = block_ffn(x, keys, values, routing.block_ids, routing.gates)
    p = (x @ router.weight.T).softmax(1)
    for t in range(T):
        e = int(p[t].argmax())
        expected = p[t, e] * (F.gelu(x[t] @ keys[e].T) @ values[e])
        # Megatron computes the softmax in fp32, whatever the router's dtype.
        torch.testing.assert_close(y[t], expected, rtol=1e-5, atol=1e-7)
    y.sum().backward()
    assert router.weight.grad.abs().sum() > 0, "the gate learns through p"


def test_s1_probabilities_are_not_renormalised_over_the_chosen(build) -> None:
    torch.manual_seed(0)
    router = build(SwitchConfig())
    x = torch.randn(T, D).double()
    routing = router(x, torch.zeros(12, 2, D))
    p = (x @ router.weight.T).softmax(1)
    torch.testing.assert_close(
        routing.gates.double(), p.gather(1, routing.block_ids).double(), rtol=1e-5, atol=1e-7
    )
    assert (routing.gates.sum(1) < 0.99).all()


def balance_loss(router, logits: torch.Tensor) -> float:
    """The loss that the router records, unweighted, for these logits."""
    router.gating = lambda x: logits
    router.train()
    get_moe_metrics_tracker().clear()
    router(torch.zeros(len(logits), D).double(), torch.zeros(B, 8, D))
    return float(get_moe_metrics_tracker().metrics["load_balancing_loss"].values.sum())


@pytest.mark.parametrize(("collapsed", "expected"), [(False, 1.0), (True, float(B))])
def test_s2_the_loss_is_1_when_even_and_b_when_collapsed(build, collapsed, expected) -> None:
    router = build(
        SwitchConfig(), **WHOLE, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01
    )
    logits = torch.zeros(T, B)
    target = torch.zeros(T, dtype=torch.long) if collapsed else torch.arange(T) % B
    # Sharp for the collapse; for evenness a hair above the rest decides the choice, not P.
    logits[torch.arange(T), target] = 1e4 if collapsed else 1e-6
    logits.requires_grad_()
    assert balance_loss(router, logits) == pytest.approx(expected, rel=1e-4)


def test_s2_the_gradient_passes_through_p_alone(build) -> None:
    torch.manual_seed(0)
    router = build(
        SwitchConfig(), **WHOLE, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01
    )
    logits = torch.randn(T, B, requires_grad=True)
    router.gating = lambda x: logits
    routing = router(torch.zeros(T, D).double(), torch.zeros(B, 8, D))
    (0 * routing.gates).sum().backward()
    frequencies = torch.bincount(routing.block_ids.flatten(), minlength=B) / T
    formula = logits.detach().clone().requires_grad_()
    loss = 0.01 * B * (formula.softmax(1).mean(0) * frequencies).sum()
    loss.backward()
    torch.testing.assert_close(logits.grad, formula.grad, rtol=1e-4, atol=1e-9)


def test_s3_the_gate_is_fp32_for_half_precision_tokens(build) -> None:
    router = build(SwitchConfig(), params_dtype=torch.bfloat16, moe_router_dtype="fp32")
    x = torch.randn(T, D, dtype=torch.bfloat16)
    routing = router(x, torch.zeros(12, 2, D))
    assert routing.gates.dtype == torch.float32
    p = (x.float() @ router.weight.float().T).softmax(1)
    torch.testing.assert_close(routing.gates, p.gather(1, routing.block_ids))
