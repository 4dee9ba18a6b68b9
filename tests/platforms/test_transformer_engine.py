"""The sparse layer in Megatron's Transformer Engine spec; on a GPU, with Transformer Engine."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.transformer.identity_op import IdentityOp
from megatron.training.models.gpt import GPTModelConfig

from megatron_sffn import SparseFFN, SparseFFNConfig
from megatron_sffn.config import SparseFFNTransformerConfig
from megatron_sffn.model import block_spec
from megatron_sffn.platforms.cpu import is_host
from megatron_sffn.routers import ROUTERS
from tests.integration.conftest import MODEL

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    is_host() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine",
)


@pytest.mark.usefixtures("one_rank")
def test_a_sparse_layer_has_a_norm_before_it_and_a_dense_one_fuses_it() -> None:
    config = SparseFFNTransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        add_bias_linear=False,
        moe_layer_freq=[0, 1],
        moe_router_load_balancing_type="none",
        transformer_impl="transformer_engine",
        sffn=SparseFFNConfig(router=ROUTERS["avg-k"](), active_cells=24, block_size=6, expansion=2),
    )
    dense, sparse = block_spec(GPTModelConfig(transformer=config)).layer_specs
    assert dense.submodules.pre_mlp_layernorm is IdentityOp
    assert sparse.submodules.pre_mlp_layernorm is not IdentityOp
    assert sparse.submodules.mlp.func is SparseFFN


def losses(implementation: str, folder: Path) -> list[float]:
    flags = f"{MODEL} --mock-data --split 90,10,0 --train-iters 5 --bf16 --hidden-size 128"
    flags += f" --transformer-impl {implementation} --save {folder} --save-interval 5"
    command = [sys.executable, "-m", "megatron_sffn.pretrain", *shlex.split(flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"lm loss: (\S+) \|", done.stdout)]


def test_it_trains_as_with_megatrons_own_modules(tmp_path: Path) -> None:
    found = []
    for implementation in ("transformer_engine", "local"):
        (tmp_path / implementation).mkdir()
        found.append(losses(implementation, tmp_path / implementation))
    assert len(found[0]) == 5
    assert found[0] == pytest.approx(found[1], rel=2e-2)
