"""The description of a run in `summary.json`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from megatron_sffn.train.run_description import CLONE, SECTIONS, commit
from tests.support.paths import ROOT

RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --train-iters 1 --mock-data "
    "--sffn-block-size 32"
)


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")  # Megatron's own
def test_megatron_has_every_flag_that_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(sys, "argv", ["pretrain", *RUN.split()])
    args = parse(dict(cpu.HOST_FLAGS.values()))
    assert {name for names in SECTIONS.values() for name in names} <= vars(args).keys()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_clone_and_says_whether_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    # A package inside the clone of another project is not that project.
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None


def test_the_clone_of_the_package_is_found() -> None:
    assert CLONE == ROOT


def test_a_git_folder_without_commits_gives_no_commit(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()  # of no use
    assert commit(tmp_path) is None
