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
MakeRequest = Callable[..., Request]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(scope="module")
def validated() -> Namespace:
    return namespace("--seq-length 16 --micro-batch-size 1 --train-iters 1 --mock-data")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three data sets."""
    for name in "abc":
        write_dataset(tmp_path / name, random_documents(150, ord(name)))
    return tmp_path


@pytest.fixture
def make_request(validated: Namespace, folder: Path) -> MakeRequest:
    """`make_request(*paths, dest=value)`: the request of a run on these data sets and flags."""

    def make(*paths: str, **overrides: Any) -> Request:
        flags = {"mock_data": False, "split": "80,10,10", "data_path": list(paths), **overrides}
        args = Namespace(**{**vars(validated), **flags})
        return dataset_request(args, load_tokenizer(args), SIZES)

    return make


def read_files(folder: Path) -> dict[str, bytes]:
    """Relative path of every file below a folder -> its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def build_with_megatron(request: Request) -> list[Any]:
    """The data sets as Megatron builds them; it writes its index files."""
    built: list[Any] = BlendedMegatronDatasetBuilder(
        request.kind, request.sizes, lambda: True, request.config
    ).build()
    return built


def blend_flags(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a kind of blend -> its flags."""
    a, b, c = (str(folder / name) for name in "abc")
    no_common_path = {"split": None, "data_path": None}
    return {
        "one": {"data_path": [a]},
        "weights": {"data_path": ["0.7", a, "0.2", b, "0.1", c]},
        "lengths": {"data_path": [a, b, c]},
        "no test": {"data_path": [a], "split": "90,10,0"},
        "own sets": {**no_common_path, "train_data_path": ["1", a, "2", b], "valid_data_path": [c]},
        "several validations": {
            **no_common_path,
            "train_data_path": [a],
            "valid_data_path": [b, c],
            "sffn_separate_validation_sets": True,
        },
        "threads": {"data_path": ["1", a, "1", b, "1", c], "num_dataset_builder_threads": 3},
    }


@pytest.mark.parametrize("name", blend_flags(Path()))
@pytest.mark.parametrize("beside", [False, True], ids=["cache path", "beside the data"])
def test_index_files_equal_megatrons(
    folder: Path, make_request: MakeRequest, name: str, beside: bool
) -> None:
    cache_path = None if beside else str(folder / "cache")
    flags = {"data_cache_path": cache_path, **blend_flags(folder)[name]}
    data = read_files(folder)
    build_with_megatron(make_request(**flags))
    megatron_files = read_files(folder)
    for path in set(megatron_files) - set(data):
        (folder / path).unlink()
    num_sets, missing = complete(make_request(**flags))
    assert num_sets == missing > 0
    assert read_files(folder) == megatron_files
    assert complete(make_request(**flags)) == (num_sets, 0)


def test_existing_files_are_not_written_again(folder: Path, make_request: MakeRequest) -> None:
    flags = {"data_cache_path": str(folder / "cache")}
    complete(make_request(str(folder / "a"), **flags))
    mtimes = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    reports = []
    blend = make_request("1", str(folder / "a"), "1", str(folder / "b"), **flags)
    complete(
        blend, lambda number, missing, index_set: reports.append((number, missing, index_set.title))
    )
    assert {path: path.stat().st_mtime_ns for path in mtimes} == mtimes
    assert [line[:2] for line in reports] == [(n, 9) for n in range(1, 10)]
    assert f"train of {folder / 'b'}" in [line[2] for line in reports]
    assert reports[-1][2] == "test, blend of 2"


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "no description", "foreign"])
@pytest.mark.parametrize("index_name", ["document_index", "sample_index", "shuffle_index"])
def test_truncated_files_are_written_again(
    folder: Path, make_request: MakeRequest, index_name: str, damage: str
) -> None:
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    expected = read_files(folder / "cache")
    (path,) = (folder / "cache").glob(f"*-train-{index_name}.npy")
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(b"text")
    elif damage == "gone":
        path.unlink()
    else:
        path.with_name(path.name.replace(f"{index_name}.npy", "description.txt")).unlink()
    assert complete(request) == (3, 1)
    assert read_files(folder / "cache") == expected


def test_index_files_of_a_data_set_that_was_made_anew_are_written_again(
    folder: Path, make_request: MakeRequest
) -> None:
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    write_dataset(folder / "a", random_documents(70, 7))
    assert complete(request) == (3, 3)
    train, _, _ = build_with_megatron(request)
    assert train.document_index.max() == 55  # of 56 documents, 80 %
    assert len(train) == len(train.shuffle_index) >= SIZES[0]


@pytest.mark.parametrize("renamed", [False, True])
def test_index_files_of_another_document_order_are_written_again(
    folder: Path, make_request: MakeRequest, renamed: bool
) -> None:
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
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
    train, valid, test = build_with_megatron(request)
    assert all(
        len(split[number]["tokens"]) == 16 for split in (train, valid, test) for number in (0, 5)
    )
    cache_files = read_files(folder / "cache")
    for path in (folder / "cache").iterdir():
        path.unlink()
    complete(request)
    assert read_files(folder / "cache") == cache_files


def test_index_files_of_a_copied_data_set_are_not_written_again(
    folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
    complete(request)
    for path in folder.glob("a.*"):
        path.write_bytes(path.read_bytes())
    monkeypatch.setattr(stale_index, "PIECE", 7)
    assert complete(request) == (3, 0)


def test_a_partial_file_of_a_killed_run_is_not_used(
    folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
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
    (partial_file,) = (folder / "cache").iterdir()
    assert partial_file.suffix == ".part"
    assert complete(request) == (3, 3)
    assert partial_file.exists(), "another process may still write it"
    index = partial_file.with_name(partial_file.name.split(".")[0] + ".npy")
    index.unlink()
    stale_time = time.time() - 2 * atomic_files.STALE_SECONDS
    os.utime(partial_file, (stale_time, stale_time))
    assert complete(request) == (3, 1)
    assert index.exists()
    assert not list((folder / "cache").glob("*.part"))


def test_an_unwritable_folder_is_reported_in_one_sentence(
    folder: Path, make_request: MakeRequest
) -> None:
    (folder / "file").write_text("")
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache \(Not a directory\); give --data-cache-pa"):
        complete(request)


def test_a_full_disk_is_reported_in_one_sentence(
    folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_save(file: Any, array: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.numpy, "save", fail_to_save)
    request = make_request(str(folder / "a"), data_cache_path=str(folder / "cache"))
    with pytest.raises(ConfigError, match="No space left on device"):
        complete(request)
    assert not list((folder / "cache").iterdir())


def test_mock_data_has_index_files_only_with_a_cache_path(
    folder: Path, make_request: MakeRequest
) -> None:
    flags = {"mock_data": True, "split": None, "data_path": None}
    assert index_sets(make_request(**flags)) == []
    request = make_request(**flags, data_cache_path=str(folder / "cache"))
    assert request.kind is MockGPTDataset
    assert complete(request) == (3, 3)


# Several nodes


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "a disk in each node"])
def test_every_node_has_all_index_files(
    folder: Path, make_request: MakeRequest, shared: bool
) -> None:
    """Four ranks on two nodes read the same samples through Megatron afterwards."""
    paths = ["2", str(folder / "a"), "1", str(folder / "b")]

    def body() -> str:
        node, local = divmod(torch.distributed.get_rank(), 2)
        os.environ["LOCAL_RANK"] = str(local)
        cache_path = folder / ("cache" if shared else f"cache{node}")
        request = make_request(*paths, data_cache_path=str(cache_path))
        complete_everywhere(request)
        digest = hashlib.sha256()
        for dataset in build_with_megatron(request):
            for array in (dataset.dataset_index, dataset.dataset_sample_index):
                digest.update(array.tobytes())
            digest.update(dataset[0]["tokens"].numpy().tobytes())
        return digest.hexdigest()

    assert len(set(run_ranks(4, body))) == 1
    caches = [read_files(path) for path in sorted(folder.glob("cache*"))]
    assert len(caches) == (1 if shared else 2)
    assert all(cache == caches[0] for cache in caches)
    # Each of three splits has four files for each of two data sets and three for the blend.
    assert len(caches[0]) == 3 * (4 + 4 + 3)


def test_megatron_alone_fails_on_the_second_node(folder: Path, make_request: MakeRequest) -> None:
    def body() -> None:
        cache_path = folder / f"cache{torch.distributed.get_rank()}"
        build_with_megatron(make_request(str(folder / "a"), data_cache_path=str(cache_path)))

    with pytest.raises(AssertionError, match=r"FileNotFoundError|No such file"):
        run_ranks(2, body)


def test_index_files_on_a_shared_disk_are_written_by_one_node(
    folder: Path, make_request: MakeRequest
) -> None:
    def body() -> list[str]:
        os.environ["LOCAL_RANK"] = "0"
        written: list[str] = []
        original = index_cache.IndexSet.write
        index_cache.IndexSet.write = lambda self: (written.append(self.title), original(self))[1]
        complete_everywhere(make_request(str(folder / "a"), data_cache_path=str(folder / "cache")))
        return written

    first, second = run_ranks(2, body)
    assert (len(first), second) == (3, [])
