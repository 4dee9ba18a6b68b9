"""Exports of settings beside router, activation, norm and heads, in our class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sffn.hf.modeling_sparse_ffn import SparseFFNBlocks, SparseFFNGPTForCausalLM
from tests.hf.test_export import check_equal
from tests.support.megatron_models import WITH_BIASES, flags_of, save_models

GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 2"
CLAMP = "--activation-func-clamp-value 0.02"
VARIANTS = [
    *(f"--sffn-descriptor {name}" for name in ("max-norm", "norm-weighted", "subset", "ema")),
    "--sffn-descriptor learned --moe-aux-loss-coeff 0.01",
    "--sffn-descriptor subset --sffn-descriptor-cells 3 --swiglu",
    "--sffn-gate sigmoid --moe-router-enable-expert-bias",
    "--moe-router-enable-expert-bias",
    "--moe-router-load-balancing-type quantile_balancing",
    "--sffn-router softmax-after --moe-router-load-balancing-type quantile_balancing",
    "--sffn-gate sigmoid-chosen --moe-router-topk-scaling-factor 2.5",
    "--sffn-gate sqrt-softplus",
    "--sffn-gate sqrt-softplus-chosen --moe-router-enable-expert-bias",
    f"--sffn-gate softmax-chosen {GROUPS}",
    *(f"--sffn-router vanilla-m --sffn-aggregator {name}" for name in ("mean-abs", "max", "min")),
    "--sffn-router vanilla-m --sffn-aggregator norm --sffn-gate softmax --swiglu",
    "--sffn-router sigma-moe --sffn-gate-network mlp --sffn-gate-activation gelu",
    "--sffn-router switch --sffn-gate-network attention --sffn-gate-hidden-size 8",
    f"--sffn-router sigma-moe --moe-router-enable-expert-bias {GROUPS}",
    f"--sffn-group-score mean {GROUPS}",
    "--sffn-router softmax-before --moe-router-enable-expert-bias",
    "--sffn-router peer --sffn-pkm-heads 2 --sffn-product-key-size 8 --sffn-gate sigmoid-chosen",
    f"{flags_of('memory-plus')} --sffn-product-key-norm",
    "--sffn-router rand-hash --sffn-hash-shared --sffn-layers every:1",
    "--sffn-shared-blocks 1",
    "--sffn-shared-blocks 2 --swiglu --sffn-router sigma-moe",
    "--sffn-block-size 1",
    "--sffn-block-size 16 --sffn-layers every:1",
    "--sffn-router sigma-moe --sffn-backend megatron --swiglu",
    "--sffn-backend megatron",
    "--qk-layernorm --normalization RMSNorm",
    "--add-qkv-bias",
    "--kv-channels 16 --group-query-attention --num-query-groups 1",
    "--rotary-percent 0.5 --rotary-base 500",
    "--rotary-interleaved --rotary-percent 0.5",
    "--use-rope-scaling --rope-scaling-factor 4 --rotary-base 500000",
    "--rotary-seq-len-interpolation-factor 2",
    "--position-embedding-type learned_absolute",
    "--position-embedding-type none",
    "--sffn-router dense --quick-geglu",
    "--sffn-router switch --sffn-shared-blocks 1 --quick-geglu",
    f"--sffn-shared-blocks 1 --quick-geglu --glu-linear-offset 1 {CLAMP}",
    f"{WITH_BIASES} --sffn-router dense --quick-geglu {CLAMP}",
    f"--sffn-router vanilla-m --swiglu {CLAMP}",
    "--norm-epsilon 1e-3",
    WITH_BIASES,
    f"{WITH_BIASES} --sffn-router switch --sffn-shared-blocks 1 --swiglu",
]


def test_our_class_computes_what_megatron_computes_for_other_settings(tmp_path: Path) -> None:
    for saved, text in zip(save_models(tmp_path, VARIANTS), VARIANTS, strict=True):
        try:
            check_equal(saved, tmp_path / "hf" / saved.load.name, architecture="sparse_ffn")
        except Exception as error:
            raise AssertionError(text) from error


@pytest.mark.parametrize("router", ["sigma-moe", "avg-k", "pkm", "peer", "lorkm"])
def test_all_forms_of_the_blocks_compute_the_same(router: str) -> None:
    config = SparseFFNGPTForCausalLM.config_class(
        sparse_layers=[0, 1],
        num_blocks=16,
        num_active_blocks=4,
        block_size=1 if router == "pkm" else 8,
        hidden_act="gelu" if router == "pkm" else "swiglu",
        router=router,
        gate="sigmoid" if router in ("sigma-moe", "peer") else "none",
        key_rank=8 if router == "lorkm" else 0,
        product_key_heads=2,
        product_key_size=8,
    )
    torch.manual_seed(0)
    blocks = SparseFFNGPTForCausalLM(config).model.layers[1].mlp
    assert isinstance(blocks, SparseFFNBlocks)
    x = torch.randn(30, 32)
    ids, gates, queries = blocks.router(x, blocks, None)
    gates = torch.ones(ids.shape) if gates is None else gates
    gathered = blocks._gathered(queries, ids, gates)
    for form in (blocks._masked, blocks._looped):
        torch.testing.assert_close(form(queries, ids, gates), gathered, rtol=1e-5, atol=1e-6)
