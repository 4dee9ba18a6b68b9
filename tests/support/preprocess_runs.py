"""Data sets of ids, and the namespace of a run, for tests of loading."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import megatron.core.tokenizers.text  # noqa: F401  (2 s that no forked rank has to spend)
import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse

VOCAB = 100
END = VOCAB - 1
"""The id that ends a document."""

MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 1 --max-position-embeddings 64 "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB} --sffn-block-size 16 --lr 1e-3"
)


def write_dataset(prefix: Path, documents: Iterable[list[int]], dtype: Any = numpy.uint16) -> str:
    """Write a data set with a document for each list of ids; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(numpy.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int, seed: int) -> list[list[int]]:
    """Documents of 1 to 40 ids, the last one `END`."""
    draw = numpy.random.default_rng(seed)
    return [[*draw.integers(0, END, draw.integers(0, 40)).tolist(), END] for _ in range(count)]


def namespace(flags: str, *, rank: int = 0, ranks: int = 1) -> Namespace:
    """Megatron's validated namespace of a run."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.13 warns about Megatron's own flags
        patch.setattr(sys, "argv", ["pretrain", *shlex.split(f"{MODEL} {flags}")])
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks)):
            patch.setitem(os.environ, name, str(value))
        return parse(dict(cpu.HOST_FLAGS.values()))
