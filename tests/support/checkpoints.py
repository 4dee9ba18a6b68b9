"""A pytest plugin: checkpoints of real runs, and models made of them on any layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.inference.options import add_model_flags
from tests.support.jobs import run_as_job
from tests.support.pretraining import run_pretraining

# Each model has other parts beside its router. The weights are large, so that the tokens differ.
MODELS = {
    "avg-k": "--sffn-router avg-k --init-method-std 0.5",
    "rand-hash": "--sffn-router rand-hash --init-method-std 0.5 --swiglu "
    "--position-embedding-type learned_absolute",
    "n-grams": "--sffn-router rand-hash --sffn-hash-ngram 3 --init-method-std 0.5",
    "switch": "--sffn-router switch --init-method-std 0.5 --normalization RMSNorm "
    "--sffn-layers every:2 --untie-embeddings-and-output-weights --mtp-num-layers 1",
    "hybrid": "--hybrid-layer-pattern *E*-/*E --num-layers 4 --sffn-router sigma-moe "
    "--init-method-std 0.5 --untie-embeddings-and-output-weights",
    "latent": "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 12 --sffn-router avg-k --init-method-std 0.5",
    "dense": "--sffn-router dense --init-method-std 0.5 --group-query-attention "
    "--num-query-groups 2 --num-attention-heads 4",
    "one-table": "--sffn-router memory-plus --sffn-block-size 1 --sffn-expansion 8 "
    "--sffn-product-key-size 16 --sffn-layers-per-table 2 --init-method-std 0.5",
    "pkm": "--sffn-router pkm --sffn-block-size 1 --sffn-expansion 8 --sffn-product-key-size 16 "
    "--init-method-std 0.5",
}
"""Name, mostly that of the router -> flags of its run."""


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer whose ids are bytes, as the data sets of `text` have them."""
    # Imports packages that a GPU machine may be without, where this plugin is loaded, too.
    from tests.support import tokenizers

    return tokenizers.bytes_as_ids(tmp_path_factory.mktemp("tokenizer"))[-1]


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, text: str, bytes_tokenizer: str
) -> Callable[[str], Path]:
    """`trained(router)` is the folder of a run of 2 steps; each is made once."""
    folders: dict[str, Path] = {}

    def folder_of(router: str) -> Path:
        if router not in folders:
            folder = tmp_path_factory.mktemp(router)
            flags = (
                f"{MODELS[router]} --train-iters 2 --lr 1e-3 --save run --save-interval 2 "
                "--split 90,10,0 --tokenizer-type HuggingFaceTokenizer "
                f"--tokenizer-model {bytes_tokenizer}"
            )
            run_pretraining(1, flags, data=text, folder=folder)
            folders[router] = folder / "run"
        return folders[router]

    return folder_of


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., Any]:
    """`use(load, function, layout)` calls `function(model)` on all ranks of a layout."""

    def call(load: Path, function: Callable[..., Any], layout: str = "", ranks: int = 1) -> Any:
        def body() -> Any:
            from megatron_sffn.inference.checkpoint_args import checked_args, find_checkpoint
            from megatron_sffn.inference.model import load_model

            parser = argparse.ArgumentParser()
            add_model_flags(parser)
            options = parser.parse_args(["--load", str(load), *layout.split()])
            source = find_checkpoint(options)
            return function(load_model(source, checked_args(source, options)))

        outputs = run_as_job(ranks, body, folder=tmp_path)
        for output in outputs[1:]:
            assert output.result == outputs[0].result, "all ranks have the result"
        return outputs[0].result

    return call
