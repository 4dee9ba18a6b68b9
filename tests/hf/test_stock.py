"""Stock classes: unmodified transformers computes Megatron's logits where our package is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sffn.hf.architectures import CLASSES
from megatron_sffn.hf.export import export
from megatron_sffn.hf.names import SPARSE_FFN
from megatron_sffn.hf.settings import settings_of
from megatron_sffn.utils.errors import ConfigError
from tests.support.megatron_models import WITH_BIASES, save_models
from tests.support.transformers_alone import check_with_transformers_alone
from tools.export import ARCHITECTURES

LLAMA = "--swiglu --normalization RMSNorm"
GROUPED = "--group-query-attention --num-query-groups 2"
EXPECTED = [
    (f"--sffn-router dense {LLAMA}", "llama"),
    (f"--sffn-router dense {LLAMA} --use-rope-scaling --kv-channels 16", "llama"),
    (f"--sffn-router dense {LLAMA} --add-qkv-bias", "qwen2"),
    (f"--sffn-router dense {LLAMA} --qk-layernorm", "qwen3"),
    ("--sffn-router dense", "starcoder2"),
    (f"--sffn-router dense --squared-relu {GROUPED}", "starcoder2"),
    (f"--sffn-router softmax-after {LLAMA} --qk-layernorm", "qwen3_moe"),
    (f"--sffn-router softmax-before {LLAMA} --qk-layernorm", "qwen3_moe"),
    (f"--sffn-router softmax-after {LLAMA} --sffn-layers every:1", "mixtral"),
    (f"--sffn-router softmax-after {LLAMA}", "qwen2_moe"),
    (f"--sffn-router switch {LLAMA} --untie-embeddings-and-output-weights", "qwen2_moe"),
    (f"--sffn-router softmax-before {LLAMA} --sffn-shared-blocks 2 --add-qkv-bias", "qwen2_moe"),
    (f"--sffn-router sigma-moe {LLAMA}", "glm4_moe"),
    (f"--sffn-router s-base {LLAMA} --rotary-percent 0.5 --qk-layernorm", "glm4_moe"),
    (
        f"--sffn-router sigma-moe {LLAMA} --sffn-shared-blocks 2 --moe-router-enable-expert-bias "
        "--sffn-layers every:1 --moe-router-num-groups 4 --moe-router-group-topk 1",
        "glm4_moe",
    ),
]
BIASED = [
    ("--sffn-router dense --rotary-percent 0.5", "gpt_neox"),
    ("--sffn-router dense --untie-embeddings-and-output-weights", "gpt_neox"),
    (f"--sffn-router dense {LLAMA}", "llama"),
    ("--sffn-router dense --no-bias-gelu-fusion", "gpt_neox"),
    (f"--sffn-router dense --sffn-relu {GROUPED}", "starcoder2"),
    (f"--sffn-router dense {GROUPED}", "starcoder2"),
]
"""Models with biases of linear layers."""


def test_transformers_alone_computes_what_megatron_computes(tmp_path: Path) -> None:
    biased = [f"{WITH_BIASES} {flags}" for flags, _ in BIASED]
    architectures = [name for _, name in (*EXPECTED, *BIASED)]
    models = save_models(tmp_path, [*(flags for flags, _ in EXPECTED), *biased])
    folders = {}
    for saved, architecture in zip(models, architectures, strict=True):
        folder = tmp_path / f"{saved.load.name}-{architecture}"
        exported = export(saved.load, folder)
        assert exported.architecture == architecture, exported.reason
        assert not (folder / "modeling_sparse_ffn.py").exists()
        folders[folder] = (saved.ids, saved.logits)
    check_with_transformers_alone(tmp_path, folders)


def test_the_command_knows_all_architectures() -> None:
    assert sorted(ARCHITECTURES) == sorted(["auto", SPARSE_FFN, *CLASSES])


def test_a_class_that_is_not_exact_is_refused_with_the_setting_and_what_is(tmp_path: Path) -> None:
    (saved,) = save_models(tmp_path, [f"--sffn-router sigma-moe {LLAMA}"])
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM has a linear gate network with"):
        export(saved.load, tmp_path / "out", architecture="qwen3_moe")
    with pytest.raises(ConfigError, match=r"use glm4_moe or sparse_ffn$"):
        export(saved.load, tmp_path / "out", architecture="llama")
    assert not (tmp_path / "out").exists()


def test_no_class_of_transformers_has_the_prices_of_quantile_balancing(tmp_path: Path) -> None:
    flags = f"{LLAMA} --moe-router-load-balancing-type quantile_balancing"
    routers = [f"--sffn-router {name} {flags}" for name in ("softmax-after", "sigma-moe")]
    for saved in save_models(tmp_path, routers):
        exported = export(saved.load, tmp_path / f"{saved.load.name}-out")
        assert exported.architecture == SPARSE_FFN
        for name in ("qwen2_moe", "glm4_moe"):
            with pytest.raises(ConfigError, match="ForCausalLM has"):
                export(saved.load, tmp_path / "out", architecture=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window_size": (4, 0)}, "--window-size 4,0 cannot be exported"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable cannot be exported"),
        ({"use_mup": True}, "--use-mup cannot be exported"),
        ({"moe_latent_size": 8}, "--moe-latent-size 8 cannot be exported"),
        ({"sffn_layers_per_table": 2}, "--sffn-layers-per-table 2 cannot be exported"),
        ({"sffn_hash_ngram": 2}, "--sffn-hash-ngram 2 cannot be exported"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn cannot"),
        ({"moe_expert_capacity_factor": 1.0}, "add --without-capacity"),
        ({"num_experts": 8, "sffn_router": "dense"}, "experts of plain Megatron"),
    ],
)
def test_a_setting_without_a_class_is_refused(change: dict[str, object], sentence: str) -> None:
    from argparse import Namespace

    saved = Namespace(
        **{"position_embedding_type": "rope", "num_layers": 2, "sffn_router": "switch", **change}
    )
    with pytest.raises(ConfigError, match=sentence):
        settings_of(saved)
