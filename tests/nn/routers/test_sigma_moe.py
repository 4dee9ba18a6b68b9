"""sigma-MoE (methods M1-M8), and its variants with a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.layer_pattern import layer_pattern
from megatron_sffn.nn.layer_spec import block_spec
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig
from megatron_sffn.nn.routers.softmax_after import SoftmaxAfterConfig
from megatron_sffn.nn.routers.softmax_before import SoftmaxBeforeConfig
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import route_topk
from tests.nn.routers.conftest import D, T, tables, transformer

RELU = {"activation_func": F.relu}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer(router=None, **numbers) -> SparseFFN:
    """A layer of ReLU cells, whose gate has weights as large as the tokens."""
    sffn = SparseFFN(transformer(router or SigmaMoEConfig(), **RELU, **numbers), layer_number=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in sffn.parameters():
            weight.normal_()
    return sffn


def experts_by_hand(sffn: SparseFFN, x: Tensor) -> list[Tensor]:
    """`ReLU(x W1_e) W2_e` of every expert, `[T, D]` each."""
    return [F.relu(x @ w1.T) @ w2 for w1, w2 in zip(*sffn.experts(), strict=True)]


@pytest.mark.parametrize("g", [1, 2, 8])
def test_m1_with_all_experts_the_output_is_the_sum_of_sigmoids_times_experts(
    one_rank: None, g: int
) -> None:
    sigma = layer(block_size=g, expansion=1)  # K = N_E
    x = torch.randn(T, D).double()
    logits = x @ sigma.router.weight.T
    expected = sum(
        logits[:, e : e + 1].sigmoid() * y for e, y in enumerate(experts_by_hand(sigma, x))
    )
    torch.testing.assert_close(sigma(x[:, None])[0][:, 0], expected, **CLOSE)


def test_m1_the_output_with_a_zero_gate_is_half_of_the_dense_ffn(one_rank: None) -> None:
    sigma = layer(expansion=1)
    with torch.no_grad():
        sigma.router.weight.zero_()
    x = torch.randn(T, D).double()
    keys, values = (table.flatten(0, 1) for table in sigma.experts())
    torch.testing.assert_close(sigma(x[:, None])[0][:, 0], F.relu(x @ keys.T) @ values / 2, **CLOSE)


def test_m1_every_chosen_block_has_its_own_sigmoid(one_rank: None) -> None:
    sigma = layer()
    x = torch.randn(T, D).double()
    scores = (x @ sigma.router.weight.T).sigmoid()
    chosen = scores >= scores.sort(dim=1, descending=True).values[:, 3:4]
    expected = sum(
        (scores * chosen)[:, e : e + 1] * y for e, y in enumerate(experts_by_hand(sigma, x))
    )
    torch.testing.assert_close(sigma(x[:, None])[0][:, 0], expected, **CLOSE)


def test_m2_one_experts_selector_leaves_other_scores_alone(build) -> None:
    x, keys, _ = tables()
    router = build(SigmaMoEConfig(), expansion=1)  # all are chosen
    with torch.no_grad():
        router.weight.normal_()
    before = router(x, keys).gates
    with torch.no_grad():
        router.weight[2] += 5.0
    after = router(x, keys).gates
    other_experts = [0, 1, 3]
    assert torch.equal(after[:, other_experts], before[:, other_experts])
    assert (after[:, 2] != before[:, 2]).all()


@pytest.mark.parametrize("config", [SoftmaxBeforeConfig, SoftmaxAfterConfig])
def test_softmax_before_and_after_the_choice_have_the_gates_of_their_formulas(
    build, config
) -> None:
    x, keys, _ = tables()
    router = build(config())
    with torch.no_grad():
        router.weight.normal_()
    routing = router(x, keys)
    weights = (x @ router.weight.T).exp()
    ids = route_topk(weights, 4)
    competing = weights if config is SoftmaxBeforeConfig else weights.gather(1, ids)
    expected = weights.gather(1, ids) / competing.sum(dim=1, keepdim=True)
    assert torch.equal(routing.block_ids, ids)
    torch.testing.assert_close(routing.gates, expected, **CLOSE)
    sums = routing.gates.sum(dim=1)
    if config is SoftmaxAfterConfig:
        torch.testing.assert_close(sums, torch.ones_like(sums), **CLOSE)
    else:
        assert (sums < 1).all()


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A model of the paper's table, with the weights of Transformer-XL that Megatron lacks."""

    width: int
    layers: int
    heads: int
    head_width: int
    experts: int
    vocabulary: int
    millions: float

    @property
    def relative_positions(self) -> int:
        """Per layer: the projection of relative positions, and the biases u and v of all heads."""
        inner = self.heads * self.head_width
        return self.layers * (self.width * inner + 2 * inner)

    @property
    def output_bias(self) -> int:
        """The bias of the logits."""
        return self.vocabulary

    def build(self) -> GPTModel:
        """Megatron's GPT, with rotary positions instead; its weights are not initialised."""
        config = SparseFFNTransformerConfig(
            num_layers=self.layers,
            hidden_size=self.width,
            ffn_hidden_size=4 * 128,
            num_attention_heads=self.heads,
            kv_channels=self.head_width,
            add_bias_linear=False,
            activation_func=F.relu,
            moe_layer_freq=layer_pattern("every:1", self.layers),
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            sffn=SparseFFNConfig(
                active_cells=4 * 128,
                block_size=128,
                expansion=self.experts // 4,
                router=SigmaMoEConfig(),
            ),
            transformer_impl="local",
            masked_softmax_fusion=False,
            perform_initialization=False,
        )
        return GPTModel(
            config=config,
            transformer_layer_spec=block_spec(GPTModelConfig(transformer=config)),
            vocab_size=self.vocabulary,
            max_sequence_length=256,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )


SMALL = {"width": 412, "layers": 16, "heads": 10, "head_width": 41, "vocabulary": 8000}
PAPER_MODELS = {
    "WT-S": PaperModel(**SMALL, experts=16, millions=47.26),
    "WT-S*": PaperModel(**SMALL, experts=128, millions=237.0),
    "WT-M": PaperModel(
        width=1024,
        layers=18,
        heads=16,
        head_width=64,
        vocabulary=8000,
        experts=32,
        millions=262.46,
    ),
    "enwik8": PaperModel(
        width=512,
        layers=12,
        heads=8,
        head_width=64,
        vocabulary=204,
        experts=16,
        millions=41.24,
    ),
}


@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning:megatron")
@pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning:megatron")
@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_m8_the_papers_models_have_its_numbers_of_parameters(one_rank: None, name: str) -> None:
    model = PAPER_MODELS[name]
    built = sum(weight.numel() for weight in model.build().parameters())
    total = built + model.relative_positions + model.output_bias
    assert abs(total / 1e6 - model.millions) <= 0.01, total
    if name == "WT-S":
        assert total == 47_260_216
    # Without the two corrections the number would be wrong.
    assert abs(built / 1e6 - model.millions) > 1


def paper_layer(experts: int = 16, g: int = 128, **numbers) -> SparseFFN:
    """A layer of WT-S: n_L = 16, d = 412, N_E·G = 2048 cells unless told otherwise."""
    config = SparseFFNTransformerConfig(
        num_layers=16,
        hidden_size=412,
        num_attention_heads=1,
        add_bias_linear=False,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        sffn=SparseFFNConfig(
            active_cells=4 * 128,
            block_size=g,
            expansion=experts * g // (4 * 128),
            router=numbers.pop("router", SigmaMoEConfig()),
            **numbers,
        ),
    )
    return SparseFFN(config, layer_number=1)


def assert_std(weight: Tensor, expected: float) -> None:
    """The std is within five standard errors of the expected one, and the mean is near zero."""
    weight = weight.detach().double()
    error = expected / math.sqrt(2 * weight.numel())
    assert abs(weight.std().item() - expected) < 5 * error, (weight.std(), expected)
    assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel())


def test_m5_weights_start_with_the_papers_standard_deviations(one_rank: None) -> None:
    paper = paper_layer()
    stds = (math.sqrt(2 / (16 * 412)), math.sqrt(2 / (16 * 16 * 128)))
    assert [round(std, 5) for std in stds] == [0.01742, 0.00781]
    assert_std(paper.experts.keys, stds[0])
    assert_std(paper.experts.values, stds[1])
    assert_std(paper.router.weight, stds[0])
    norms = paper.router.weight.detach().double().norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(16), rtol=1e-5, atol=0)
    # The rows have different directions.
    cosines = F.normalize(paper.router.weight.detach(), dim=1)
    assert (cosines @ cosines.T - torch.eye(16)).abs().max() < 0.3


@pytest.mark.parametrize("initialization", ["sigma-moe", "sigma-moe-block"])
def test_m6_the_same_cells_in_finer_blocks_start_with_the_std_of_the_formula(
    one_rank: None, initialization: str
) -> None:
    for experts, g in ((4, 512), (16, 128), (64, 32)):
        fine = paper_layer(experts, g, initialization=initialization)
        cells = (
            2048 if initialization == "sigma-moe" else g
        )  # the ablation counts the cells of an expert
        assert_std(fine.experts.values, math.sqrt(2 / (16 * cells)))
        assert_std(fine.experts.keys, math.sqrt(2 / (16 * 412)))


@pytest.mark.parametrize("config", [SigmaMoEConfig, SoftmaxBeforeConfig, SoftmaxAfterConfig])
def test_the_papers_initialization_is_the_default_and_can_be_changed(
    one_rank: None, config: type[SigmaMoEConfig]
) -> None:
    assert config.initialization == "sigma-moe"
    assert_std(paper_layer(router=config()).experts.values, math.sqrt(2 / (16 * 2048)))
    plain = paper_layer(router=config(), initialization="megatron")
    assert_std(plain.experts.keys, 0.02)
    assert_std(plain.experts.values, 0.02 / math.sqrt(2 * 16))
