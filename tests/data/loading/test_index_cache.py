"""Index files are complete, and every node has the files that Megatron reads."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset

from megatron_sffn.data.loading import index_cache, stale_index
from megatron_sffn.data.loading.gpt_dataset import dataset_request
from megatron_sffn.data.loading.index_cache import (
    Request,
    complete,
    complete_everywhere,
    index_sets,
)
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.utils import atomic_files
from megatron_sffn.utils.errors import ConfigError
from tests.support.preprocess_runs import namespace, random_documents, write_dataset
from tests.support.ranks import run_ranks

SIZES = (200, 20, 10)
Ask = Callable[..., Request]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it Megatron's logging warns that it does not know the rank."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def validated() -> Namespace:
    return namespace("--seq-length 16 --micro-batch-size 1 --train-iters 1 --mock-data")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With three data sets."""
    for name in "abc":
        write_dataset(tmp_path / name, random_documents(150, ord(name)))
    return tmp_path


@pytest.fixture
def ask(validated: Namespace, folder: Path) -> Ask:
    """`ask(*paths, dest=value)`: of a run on these data sets, with other flags."""

    def make(*paths: str, **given: Any) -> Request:
        flags = {"mock_data": False, "split": "80,10,10", "data_path": list(paths), **given}
        args = Namespace(**{**vars(validated), **flags})
        return dataset_request(args, load_tokenizer(args), SIZES)

    return make


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def by_megatron(request: Request) -> list[Any]:
    """The data sets as Megatron builds them, with its files."""
    built: list[Any] = BlendedMegatronDatasetBuilder(
        request.kind, request.sizes, lambda: True, request.config
    ).build()
    return built


def blends(folder: Path) -> dict[str, dict[str, Any]]:
    """Names of what can be asked for -> flags."""
    a, b, c = (str(folder / name) for name in "abc")
    own = {"split": None, "data_path": None}
    return {
        "one": {"data_path": [a]},
        "weights": {"data_path": ["0.7", a, "0.2", b, "0.1", c]},
        "lengths": {"data_path": [a, b, c]},
        "no test": {"data_path": [a], "split": "90,10,0"},
        "own sets": {**own, "train_data_path": ["1", a, "2", b], "valid_data_path": [c]},
        "several validations": {
            **own,
            "train_data_path": [a],
            "valid_data_path": [b, c],
            "sffn_separate_validation_sets": True,
        },
        "threads": {"data_path": ["1", a, "1", b, "1", c], "num_dataset_builder_threads": 3},
    }


@pytest.mark.parametrize("name", blends(Path()))
@pytest.mark.parametrize("beside", [False, True], ids=["cache path", "beside the data"])
def test_the_files_are_megatrons(folder: Path, ask: Ask, name: str, beside: bool) -> None:
    where = None if beside else str(folder / "cache")
    flags = {"data_cache_path": where, **blends(folder)[name]}
    data = files(folder)
    by_megatron(ask(**flags))
    theirs = files(folder)
    for path in set(theirs) - set(data):
        (folder / path).unlink()
    sets, missing = complete(ask(**flags))
    assert sets == missing > 0
    assert files(folder) == theirs
    assert complete(ask(**flags)) == (sets, 0)


def test_existing_files_stay(folder: Path, ask: Ask) -> None:
    flags = {"data_cache_path": str(folder / "cache")}
    complete(ask(str(folder / "a"), **flags))
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    told = []
    blend = ask("1", str(folder / "a"), "1", str(folder / "b"), **flags)
    complete(blend, lambda done, missing, one: told.append((done, missing, one.title)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line[:2] for line in told] == [(n, 9) for n in range(1, 10)]
    assert f"train of {folder / 'b'}" in [line[2] for line in told]
    assert told[-1][2] == "test, blend of 2"


@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "no description", "foreign"])
@pytest.mark.parametrize("which", ["document_index", "sample_index", "shuffle_index"])
def test_truncated_files_are_written_again(folder: Path, ask: Ask, which: str, harm: str) -> None:
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    good = files(folder / "cache")
    (path,) = (folder / "cache").glob(f"*-train-{which}.npy")
    if harm == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "foreign":
        path.write_bytes(b"text")
    elif harm == "gone":
        path.unlink()
    else:
        path.with_name(path.name.replace(f"{which}.npy", "description.txt")).unlink()
    assert complete(request) == (3, 1)
    assert files(folder / "cache") == good


def test_files_of_a_data_set_that_was_made_anew_are_written_again(folder: Path, ask: Ask) -> None:
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    write_dataset(folder / "a", random_documents(70, 7))
    assert complete(request) == (3, 3)
    train, _, _ = by_megatron(request)
    assert train.document_index.max() == 55  # of 56 documents, 80 %
    assert len(train) == len(train.shuffle_index) >= SIZES[0]


@pytest.mark.parametrize("renamed", [False, True])
def test_files_of_another_order_of_documents_are_written_again(
    folder: Path, ask: Ask, renamed: bool
) -> None:
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    documents = random_documents(150, ord("a"))
    random.Random(0).shuffle(documents)
    if renamed:  # made before the index, and older
        write_dataset(folder / "new", documents)
        os.utime(folder / "new.idx", (1, 1))
    complete(request)
    if renamed:
        for ending in (".bin", ".idx"):
            (folder / f"new{ending}").replace(folder / f"a{ending}")
    else:
        write_dataset(folder / "a", documents)
    assert complete(request) == (3, 3)
    train, valid, test = by_megatron(request)
    assert all(
        len(part[number]["tokens"]) == 16 for part in (train, valid, test) for number in (0, 5)
    )
    kept = files(folder / "cache")
    for path in (folder / "cache").iterdir():
        path.unlink()
    complete(request)
    assert files(folder / "cache") == kept


def test_files_of_a_data_set_that_was_copied_stay(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    for path in folder.glob("a.*"):
        path.write_bytes(path.read_bytes())
    monkeypatch.setattr(stale_index, "PIECE", 7)
    assert complete(request) == (3, 0)


def test_a_partial_file_of_a_kill_is_not_used(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    save = numpy.save

    def die(file: Any, array: Any) -> None:
        save(file, array[: len(array) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(index_cache.numpy, "save", die)
        complete(request)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    (part,) = (folder / "cache").iterdir()
    assert part.suffix == ".part"
    assert complete(request) == (3, 3)
    assert part.exists(), "another process may still write it"
    index = part.with_name(part.name.split(".")[0] + ".npy")
    index.unlink()
    old = time.time() - 2 * atomic_files.STALE_SECONDS
    os.utime(part, (old, old))
    assert complete(request) == (3, 1)
    assert index.exists()
    assert not list((folder / "cache").glob("*.part"))


def test_a_folder_that_cannot_be_written_is_one_sentence(folder: Path, ask: Ask) -> None:
    (folder / "file").write_text("")
    request = ask(str(folder / "a"), data_cache_path=str(folder / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache \(Not a directory\); give --data-cache-pa"):
        complete(request)


def test_a_full_disk_is_one_sentence(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, array: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.numpy, "save", full)
    request = ask(str(folder / "a"), data_cache_path=str(folder / "cache"))
    with pytest.raises(ConfigError, match="No space left on device"):
        complete(request)
    assert not list((folder / "cache").iterdir())


def test_mock_data_has_files_only_in_a_cache(folder: Path, ask: Ask) -> None:
    flags = {"mock_data": True, "split": None, "data_path": None}
    assert index_sets(ask(**flags)) == []
    request = ask(**flags, data_cache_path=str(folder / "cache"))
    assert request.kind is MockGPTDataset
    assert complete(request) == (3, 3)


# Several nodes


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "a disk in each node"])
def test_every_node_has_the_files(folder: Path, ask: Ask, shared: bool) -> None:
    """Four ranks on two nodes: what each reads through Megatron afterwards."""
    paths = ["2", str(folder / "a"), "1", str(folder / "b")]

    def body() -> str:
        node, local = divmod(torch.distributed.get_rank(), 2)
        os.environ["LOCAL_RANK"] = str(local)
        where = folder / ("cache" if shared else f"cache{node}")
        request = ask(*paths, data_cache_path=str(where))
        complete_everywhere(request)
        digest = hashlib.sha256()
        for dataset in by_megatron(request):
            for array in (dataset.dataset_index, dataset.dataset_sample_index):
                digest.update(array.tobytes())
            digest.update(dataset[0]["tokens"].numpy().tobytes())
        return digest.hexdigest()

    assert len(set(run_ranks(4, body))) == 1
    caches = [files(path) for path in sorted(folder.glob("cache*"))]
    assert len(caches) == (1 if shared else 2)
    assert all(one == caches[0] for one in caches)
    # Three splits: four files for each of two data sets, three for the blend.
    assert len(caches[0]) == 3 * (4 + 4 + 3)


def test_megatron_alone_fails_on_the_second_node(folder: Path, ask: Ask) -> None:
    def body() -> None:
        where = folder / f"cache{torch.distributed.get_rank()}"
        by_megatron(ask(str(folder / "a"), data_cache_path=str(where)))

    with pytest.raises(AssertionError, match=r"FileNotFoundError|No such file"):
        run_ranks(2, body)


def test_a_shared_disk_is_written_once(folder: Path, ask: Ask) -> None:
    def body() -> list[str]:
        os.environ["LOCAL_RANK"] = "0"
        written: list[str] = []
        original = index_cache.IndexSet.write
        index_cache.IndexSet.write = lambda self: (written.append(self.title), original(self))[1]
        complete_everywhere(ask(str(folder / "a"), data_cache_path=str(folder / "cache")))
        return written

    first, second = run_ranks(2, body)
    assert (len(first), second) == (3, [])
