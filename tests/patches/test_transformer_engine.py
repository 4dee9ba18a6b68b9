"""The sparse layer in Megatron's Transformer Engine spec: its place, and training on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sffn.patches.cpu import is_host
from tests.support.paths import ROOT
from tests.support.pretraining import MODEL

needs_engine = pytest.mark.skipif(
    is_host() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine",
)


def python(*words: str, folder: Path) -> str:
    """Run a program and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("engine", ["stand-in", pytest.param("installed", marks=needs_engine)])
def test_a_sparse_layer_has_a_norm_before_it_and_a_dense_one_fuses_it(
    engine: str, tmp_path: Path
) -> None:
    printed = python("-m", "tests.patches.engine_layers", engine, folder=tmp_path)
    dense, sparse = json.loads(printed.splitlines()[-1])
    assert dense["qkv"] == sparse["qkv"] == "TELayerNormColumnParallelLinear"
    assert (dense["norm"], dense["mlp"]) == ("IdentityOp", "MLP.as_mlp_submodule")
    assert sparse["norm"] != "IdentityOp"
    assert sparse["mlp"] == "SparseFFN"


def losses(implementation: str, folder: Path) -> list[float]:
    flags = f"{MODEL} --mock-data --split 90,10,0 --train-iters 5 --bf16 --hidden-size 128"
    flags += f" --transformer-impl {implementation} --save {folder} --save-interval 5"
    printed = python("-m", "megatron_sffn.pretrain", *shlex.split(flags), folder=folder)
    return [float(loss) for loss in re.findall(r"lm loss: (\S+) \|", printed)]


@needs_engine
def test_transformer_engine_trains_as_megatrons_own_modules_do(tmp_path: Path) -> None:
    losses_by_engine = []
    for implementation in ("transformer_engine", "local"):
        (tmp_path / implementation).mkdir()
        losses_by_engine.append(losses(implementation, tmp_path / implementation))
    assert len(losses_by_engine[0]) == 5
    assert losses_by_engine[0] == pytest.approx(losses_by_engine[1], rel=2e-2)
