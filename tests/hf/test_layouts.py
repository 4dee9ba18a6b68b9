"""An export of a trained checkpoint does not depend on the layout that saved it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sffn.hf.export import export
from tests.support.megatron_models import logits_of
from tests.support.pretraining import MODEL, Log
from tests.support.transformers_alone import check_with_transformers_alone

TRAINED = (
    "--train-iters 3 --save-interval 3 --eval-iters 0 --split 1,0,0 --num-layers 4 "
    "--ffn-hidden-size 32 --init-method-std 0.1 --sffn-layers every:2 "
    "--sffn-shared-blocks 1 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2"
)
LAYOUT = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
    "--expert-model-parallel-size 2"
)


@pytest.mark.parametrize(
    ("flags", "architecture"),
    [
        (
            "--sffn-router sigma-moe --swiglu --normalization RMSNorm --qk-layernorm "
            "--moe-router-enable-expert-bias --sffn-layers last:2",
            "glm4_moe",
        ),
        pytest.param("--sffn-router vanilla-m", "sparse_ffn", marks=pytest.mark.slow),
        pytest.param("--sffn-router rand-hash", "sparse_ffn", marks=pytest.mark.slow),
        pytest.param("--sffn-router dense --swiglu", "sparse_ffn", marks=pytest.mark.slow),
    ],
)
def test_tp2_pp2_ep2(
    pretrain: Callable[..., Log], tmp_path: Path, flags: str, architecture: str
) -> None:
    layout = LAYOUT.replace("--expert-model-parallel-size 2", "") if "dense" in flags else LAYOUT
    if "dense" in flags:
        flags += " --sffn-layers every:1"
    load = tmp_path / "run"
    pretrain(4, f"{TRAINED} {flags} {layout} --save {load}")
    ids = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(2))
    expected = logits_of(load, f"{MODEL} {TRAINED} {flags} --mock-data", ids)
    exported = export(load, tmp_path / "hf")
    assert (exported.architecture, exported.iteration) == (architecture, 3)
    if architecture != "sparse_ffn":
        check_with_transformers_alone(tmp_path, {tmp_path / "hf": (ids, expected)})
        export(load, tmp_path / "hf", architecture="sparse_ffn", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
