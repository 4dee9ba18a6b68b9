"""The command that writes index files: output and errors."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.support.preprocess_runs import MODEL, random_documents, write_dataset
from tests.support.processes import HANGS
from tests.support.ranks import fork
from tools import build_index_cache

RUN = f"{MODEL} --seq-length 16 --micro-batch-size 1 --train-iters 20 --eval-iters 2"


def test_the_tool_prints_each_set_of_index_files_that_it_writes(
    start_tool: Any, tmp_path: Path
) -> None:
    a, b = (write_dataset(tmp_path / name, random_documents(150, ord(name))) for name in "ab")
    cache = tmp_path / "cache"
    flags = f"--ranks 8 {RUN} --data-path 1 {a} 3 {b} --split 80,10,10 --data-cache-path {cache}"
    process = start_tool("build_index_cache.py", *flags.split())
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert re.fullmatch(
        rf"9 sets of index files in {cache}, 9 of them new \(\d+\.\d s\)\n", stdout
    ), stdout
    splits = ("train", "valid", "test")
    titles = [f"{split} of {path}" for split in splits for path in (a, b)]
    titles += [f"{split}, blend of 2" for split in splits]
    written = [f"written {number} of 9: {title}" for number, title in enumerate(titles, 1)]
    assert stderr.splitlines() == written
    assert len(list(cache.iterdir())) == 3 * (4 + 4 + 3)
    second_stdout = run_in_a_fork(flags)
    assert re.search(r"9 sets .*, 0 of them new", second_stdout), second_stdout


def run_in_a_fork(flags: str) -> str:
    """Run the tool in a fork, because it changes global state; returns its output or error."""

    def body(rank: int, folder: Path) -> str:
        warnings.simplefilter("ignore")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                build_index_cache.main(flags.split())
        except ConfigError as error:
            return f"error: {error}"
        return printed.getvalue()

    (message,) = fork(1, body)
    return str(message)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--ranks 0", "--ranks 0 must be at least 1"),
        ("--mock-data", "--mock-data without --data-cache-path has no index files"),
        ("--data-path {a} --split 100,0,0", "leaves nothing for validation, but --eval-iters 2"),
        (
            "--data-path {a} --split 80,10,10 --phase-transition-iterations 5",
            "--phase-transition-iterations has index files for each phase",
        ),
        ("--data-path {a} --split 80,10,10 --no-such-flag", "--no-such-flag; --help lists our"),
        (
            "--data-path {a} --split 80,10,10 --tensor-model-parallel-size 3",
            "does not divide the number of ranks, 1",
        ),
    ],
)
def test_wrong_flags_are_refused(tmp_path: Path, flags: str, sentence: str) -> None:
    a = write_dataset(tmp_path / "a", random_documents(150, 1))
    files_before = sorted(tmp_path.rglob("*"))
    message = run_in_a_fork(f"{RUN} {flags.format(a=a)}")
    assert message.startswith("error: ")
    assert sentence in message
    assert sorted(tmp_path.rglob("*")) == files_before
