"""Gate networks: formulas, parameters, jitter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.learned import ACTIVATIONS, LearnedConfig
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig
from megatron_sffn.nn.routers.switch import SwitchConfig
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import B, D, tables

LEARNED = [name for name, config in ROUTERS.items() if issubclass(config, LearnedConfig)]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def filled(router):
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_()
    return router


def test_the_linear_network_is_its_formula(build) -> None:
    x, keys, _ = tables()
    router = filled(build(SwitchConfig()))
    assert {name: tuple(w.shape) for name, w in router.named_parameters()} == {"weight": (B, D)}
    torch.testing.assert_close(router.score(x, x, keys), x @ router.weight.T, **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [None, 9])
def test_the_mlp_network_is_its_formula(build, width: int | None, activation: str) -> None:
    x, keys, _ = tables()
    options = {"network": "mlp", "network_width": width, "network_activation": activation}
    router = filled(build(SwitchConfig(**options)))
    assert router.hidden.shape == (width or D, D)
    f = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[activation]
    expected = f(x @ router.hidden.T) @ router.weight.T
    torch.testing.assert_close(router.score(x, x, keys), expected, **CLOSE)


@pytest.mark.parametrize("width", [None, 9])
def test_the_attention_network_is_its_formula(build, width: int | None) -> None:
    x, keys, _ = tables()
    router = filled(build(SwitchConfig(network="attention", network_width=width)))
    expected = (x @ router.hidden.T) @ router.weight.T / math.sqrt(width or D)
    torch.testing.assert_close(router.score(x, x, keys), expected, **CLOSE)


@pytest.mark.parametrize("network", ["linear", "mlp", "attention"])
@pytest.mark.parametrize("name", LEARNED)
def test_every_network_has_its_parameters_and_gradients(build, name: str, network: str) -> None:
    x, keys, _ = tables()
    config = ROUTERS[name](network=network, network_width=None if network == "linear" else 5)
    router = filled(build(config))
    count = sum(weight.numel() for weight in router.parameters())
    extra = B * D if name == "noisy-top-k" else 0
    assert count == (B * D if network == "linear" else B * 5 + 5 * D) + extra
    assert count == config.parameters(router.sffn, D)
    router(x, keys).gates.square().sum().backward()
    for weight_name, weight in router.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, weight_name


@pytest.mark.parametrize("network", ["linear", "mlp", "attention"])
def test_gradients_of_the_scores_are_those_of_the_formula(build, network: str) -> None:
    x, keys, _ = tables()
    activation = {"network_activation": "gelu"} if network == "mlp" else {}
    router = filled(build(SigmaMoEConfig(network=network, **activation)))
    leaves = (x.requires_grad_(), *router.parameters())
    routing = router(x, keys)
    scores = x @ router.weight.T
    if network == "mlp":
        scores = F.gelu(x @ router.hidden.T) @ router.weight.T
    elif network == "attention":
        scores = x @ router.hidden.T @ router.weight.T / math.sqrt(D)
    expected = scores.sigmoid().gather(1, routing.block_ids)
    torch.testing.assert_close(routing.gates, expected, **CLOSE)
    actual_grads = torch.autograd.grad(routing.gates.square().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_jitter_multiplies_tokens_for_the_score_in_training_alone(build, monkeypatch) -> None:
    x, keys, _ = tables()
    router = filled(build(SwitchConfig(), moe_input_jitter_eps=0.2))
    torch.manual_seed(1)
    factors = torch.empty_like(x).uniform_(0.8, 1.2)
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2
    torch.manual_seed(1)
    torch.testing.assert_close(router.score(x, x, keys), (x * factors) @ router.weight.T, **CLOSE)
    router.eval()
    torch.testing.assert_close(router.score(x, x, keys), x @ router.weight.T, **CLOSE)


def test_undefined_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="--sffn-gate-network cnn is unknown; choose from linear"):
        SwitchConfig(network="cnn")
    with pytest.raises(ConfigError, match="--sffn-gate-hidden-size 0 is out of range"):
        SwitchConfig(network_width=0)
    with pytest.raises(ConfigError, match="--sffn-gate-activation sin is unknown"):
        SwitchConfig(network_activation="sin")
