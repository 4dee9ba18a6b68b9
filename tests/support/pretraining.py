"""A pytest plugin: real pretraining runs in forked ranks, with the whole command, on real text."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sffn.pretrain import main
from tests.support.jobs import run_as_job
from tests.support.paths import ROOT

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --disable-bias-linear
    --tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 64
    --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --lr-decay-style constant
    --attention-dropout 0 --hidden-dropout 0 --num-workers 0 --log-interval 1 --eval-interval 1000
    --eval-iters 2 --no-create-attention-mask-in-dataloader --sffn-block-size 8 --sffn-expansion 4
"""


def write_bytes(prefix: Path, paths: list[Path]) -> str:
    """Write a data set of the bytes of files, one document per file; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for path in paths:
        data = numpy.frombuffer(path.read_bytes(), dtype=numpy.uint8).astype(numpy.int64)
        builder.add_document(data, [len(data)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of this Python's own source."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    return write_bytes(tmp_path_factory.mktemp("text") / "stdlib", paths)


@pytest.fixture(scope="session")
def fixed_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set that is the same on every machine and Python: the license, several times over."""
    license_text = ROOT / "LICENSE"
    return write_bytes(tmp_path_factory.mktemp("text") / "license", [license_text] * 4)


@dataclass(frozen=True, kw_only=True)
class Log:
    """The output of a run.

    Args:
        text: output of the last rank, which prints Megatron's progress lines.
    """

    text: str

    def values(self, name: str) -> list[float]:
        """A column of the progress lines, such as `grad norm`."""
        return [float(v) for v in re.findall(rf"{name}: +([-+.\dEe]+) \|", self.text)]

    @property
    def validation_loss(self) -> float:
        """The loss of the last evaluation on the validation set."""
        return float(re.findall(r"on validation set \| lm loss value: (\S+)", self.text)[-1])


def run_pretraining(ranks: int, flags: str, *, data: str, folder: Path) -> Log:
    """Run the entry point on forked ranks, with a folder as working directory; returns its log."""
    import megatron.core.tokenizers.text  # noqa: F401  (2 s that no forked rank has to spend)

    data_flags = f"--data-path {data}" if data else ""  # otherwise `flags` has them

    def body() -> None:
        sys.argv = ["pretrain", *shlex.split(f"{MODEL} {data_flags} {flags}")]
        main()

    outputs = run_as_job(ranks, body, folder=folder, merge=True)
    return Log(text=outputs[-1].stdout)


@pytest.fixture
def pretrain(text: str, tmp_path: Path) -> Callable[..., Log]:
    """`pretrain(ranks, flags)` runs the entry point and returns its log."""

    def run(ranks: int, flags: str, *, data: str = text) -> Log:
        return run_pretraining(ranks, flags, data=data, folder=tmp_path)

    return run
