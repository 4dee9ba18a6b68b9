"""Merged data sets equal Megatron's byte for byte, need little memory, and appear atomically."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import merge_datasets
import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sffn.data.indexed import format as indexed
from megatron_sffn.data.indexed.format import IndexWriter, check_index, open_index
from megatron_sffn.data.indexed.merge import merge
from megatron_sffn.utils.errors import ConfigError
from tests.support.dataset_pairs import content, merged_by_megatron, random_documents, write_pair
from tests.support.processes import HANGS


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


def run(*arguments: object) -> int:
    return merge_datasets.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets, one of them without tokens, and another file."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    (folder / "README").write_text("not a data set")
    for name, count in {"a.b": 40, "a": 3, "empty": 0, "z": 15}.items():
        write_pair(folder / name, random_documents(count, seed=count))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> list[str]:
    """The data sets, in the order of their names."""
    return [str(folder / name) for name in ("a", "a.b", "empty", "z")]


@pytest.fixture(scope="module")
def merged(folder: Path, shards: list[str]) -> dict[str, bytes]:
    """The merged data set that Megatron writes."""
    return content(merged_by_megatron(folder.with_name("megatron"), shards))


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_a_merged_data_set_equals_megatrons(tmp_path: Path, start_tool: Any, dtype: Any) -> None:
    prefixes = [
        write_pair(tmp_path / name, random_documents(20, seed=seed), dtype)
        for seed, name in enumerate("cab")
    ]
    expected = content(merged_by_megatron(tmp_path / "megatron", prefixes, dtype))
    process = start_tool(
        "merge_datasets.py", "--input", *prefixes, "--output-prefix", tmp_path / "ours"
    )
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert content(tmp_path / "ours") == expected
    index = open_index(f"{tmp_path}/ours")
    assert f"ours: 60 documents, {index.num_tokens} tokens" in stdout and "of 3 data sets" in stdout
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("piece_size", [1, 7])
def test_indices_can_be_merged_in_pieces(
    tmp_path: Path,
    shards: list[str],
    merged: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    piece_size: int,
) -> None:
    monkeypatch.setattr(indexed, "PIECE", piece_size)
    assert run("--input", *shards, "--output-prefix", tmp_path / "out") == 0
    assert content(tmp_path / "out") == merged


@pytest.mark.parametrize("name", ["shards", "shards/*", "shards/a shards/a.b shards/[ez]*"])
def test_folders_and_globs_are_merged(
    tmp_path: Path,
    folder: Path,
    merged: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    assert run("--input", *name.split(), "--output-prefix", tmp_path / "out") == 0
    assert content(tmp_path / "out") == merged


def test_data_sets_beyond_four_gigabytes_are_merged(tmp_path: Path) -> None:
    # A sparse file needs no disk space. It has two sequences because a length is an int32.
    lengths = numpy.array([2**31 - 1, 10], numpy.int32)
    writer = IndexWriter(numpy.dtype("u2"), tmp_path)
    writer.add_sequences(lengths)
    writer.end_documents(numpy.array([1, 2]))
    writer.finish(tmp_path / "large.idx")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=numpy.int64)))
        file.seek(2 * (2**31 - 1))
        file.write(numpy.array([8, 9], numpy.uint16).tobytes())
    small = write_pair(tmp_path / "small", [[[1, 2]], [[3]]])
    large = f"{tmp_path}/large"
    assert run("--input", large, small, "--output-prefix", tmp_path / "out") == 0
    assert os.stat(tmp_path / "out.bin").st_size == 2 * (2**31 - 1 + 10 + 3)
    assert os.stat(tmp_path / "out.bin").st_blocks * 512 < 1 << 20
    merged = IndexedDataset(f"{tmp_path}/out")
    assert merged.index.sequence_pointers.tolist() == [0, 2**32 - 2, 2**32 + 18, 2**32 + 22]
    assert [merged[number].tolist() for number in (1, 2, 3)] == [[8, 9] + [0] * 8, [1, 2], [3]]
    check_index(open_index(f"{tmp_path}/out"))


def test_memory_does_not_grow_with_the_number_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "PIECE", 1 << 12)
    num_documents = 300_000
    writer = IndexWriter(numpy.dtype("u2"), tmp_path)
    writer.add_sequences(numpy.ones(num_documents, numpy.int32))
    writer.end_documents(numpy.arange(1, num_documents + 1))
    writer.finish(tmp_path / "many.idx")
    (tmp_path / "many.bin").write_bytes(bytes(2 * num_documents))
    tracemalloc.start()
    assert run("--input", tmp_path / "many", "--output-prefix", tmp_path / "out") == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content(tmp_path / "out") == content(tmp_path / "many")
    # The index has 20 bytes per document.
    assert peak < 1_000_000 < os.path.getsize(tmp_path / "out.idx") / 5


def test_more_data_sets_than_open_files_are_merged(tmp_path: Path) -> None:
    prefixes = [write_pair(tmp_path / f"{number:03}", [[[number]]]) for number in range(60)]
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard_limit))
    try:
        assert run("--input", tmp_path, "--output-prefix", tmp_path / "out") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
    assert len(prefixes) == open_index(f"{tmp_path}/out").num_documents


def test_weights_that_fit_the_tokens_are_added_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_pair(tmp_path / "a", [[[1] * 30]]), write_pair(tmp_path / "b", [[[2] * 60]])
    assert run("--input", "0.1", a, "0.2", b, "--output-prefix", tmp_path / "out") == 0
    assert f"in a blend: 0.3 {tmp_path}/out" in capsys.readouterr().out
    # Rounded weights are accepted, and a weight of a folder.
    assert run("--input", "0.334", a, "0.666", b, "--output-prefix", tmp_path / "round") == 0
    (tmp_path / "more").mkdir()
    c = write_pair(tmp_path / "more" / "c", [[[1] * 10]])
    write_pair(tmp_path / "more" / "d", [[[1] * 20]])
    assert run("--input", "1", a, "1", tmp_path / "more", "--output-prefix", tmp_path / "x") == 0
    assert "in a blend: 2 " in capsys.readouterr().out
    assert content(tmp_path / "x") == content(
        merged_by_megatron(tmp_path / "m", [a, c, f"{tmp_path}/more/d"])
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("1 a 1 b", "the weight 1 of a is 50.0% of all, but its tokens are 33.3%"),
        ("1 a b", "--input 1 a b has weights for some data sets only; give one before each"),
        ("1 a 2 b 3", "has weights for some data sets only"),
        ("a 1 b 2", "has weights for some data sets only"),
        ("1 2 a b", "has weights for some data sets only"),
        ("0 a 2 b", "has a weight that is not positive; leave out"),
        ("nan a 2 b", "has a weight that is not positive"),
        ("a b a", "--input names a twice; name each data set once"),
        ("a ./a", "--input names ./a twice"),
        ("a [a]", "names a twice"),
        ("a wide", r"a\.bin holds uint16 ids and wide\.bin int32, so different tokenizers"),
        ("a nowhere", r"nowhere\.idx does not exist; give the path"),
        ("a no*where", r"--input no\*where leads to no data set; give a folder"),
        ("nothing", "--input nothing leads to no data set"),
        ("half", r"half/c\.bin does not exist"),
        ("a truncated", r"truncated\.bin has 10 bytes, but its index says 12"),
        ("a foreign", r"foreign\.idx is no index"),
        ("a damaged", r"damaged\.idx is damaged, its sequences do not follow"),
        ("empty", "names 1 data sets without tokens; give one with documents"),
        ("out a", "--output-prefix out is one of the data sets to merge; give another"),
    ],
)
def test_bad_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pair(Path("a"), [[[1] * 5]])
    write_pair(Path("b"), [[[2] * 10]])
    write_pair(Path("out"), [[[2] * 10]])
    write_pair(Path("wide"), [[[1] * 5]], numpy.int32)
    write_pair(Path("empty"), [[], []])
    for name in ("truncated", "damaged"):
        write_pair(Path(name), [[[1, 2], [3, 4], [5, 6]]])
    Path("truncated.bin").write_bytes(bytes(10))
    index = bytearray(Path("damaged.idx").read_bytes())
    index[34], index[38] = 1, 3
    Path("damaged.idx").write_bytes(index)
    Path("foreign.bin").write_bytes(b"image")
    Path("foreign.idx").write_bytes(b"something else" * 10)
    Path("nothing").mkdir()
    Path("half").mkdir()
    write_pair(Path("half/c"), [[[1]]])
    Path("half/c.bin").unlink()
    files_before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message) as error:
        run("--input", *inputs.split(), "--output-prefix", "out", "--overwrite")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files_before


def test_bad_outputs_are_refused(tmp_path: Path, shards: list[str]) -> None:
    flags = ["--input", shards[0], "--output-prefix"]
    with pytest.raises(ConfigError, match=r"nowhere/out lies in .*nowhere, which is no folder"):
        run(*flags, tmp_path / "nowhere" / "out")
    with pytest.raises(ConfigError, match="--multimodal is not available"):
        run(*flags, tmp_path / "out", "--multimodal")
    for ending in (".bin", ".idx"):
        (tmp_path / f"out{ending}").write_bytes(b"old")
        with pytest.raises(ConfigError, match=rf"out\{ending} is there already; add --overwrite"):
            run(*flags, tmp_path / "out")
        assert (tmp_path / f"out{ending}").read_bytes() == b"old"
        (tmp_path / f"out{ending}").unlink()


def test_existing_files_are_replaced_on_request(
    tmp_path: Path, shards: list[str], merged: dict[str, bytes]
) -> None:
    write_pair(tmp_path / "out", [[[1]]])
    assert run("--input", *shards, "--output-prefix", tmp_path / "out", "--overwrite") == 0
    assert content(tmp_path / "out") == merged


LIMITED_SCRIPT = """
import json, resource, signal, sys
import merge_datasets
from megatron_sffn.utils.errors import run_command
kill, limit, arguments = json.loads(sys.argv[1])
if kill:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_command(lambda: merge_datasets.main(arguments))
"""


def run_limited(limit: int, *arguments: object, kill: bool) -> subprocess.CompletedProcess[str]:
    """Run the tool in a process that may write `limit` bytes per file; more fails or kills it."""
    settings = json.dumps([kill, limit, [str(argument) for argument in arguments]])
    root = Path(merge_datasets.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", LIMITED_SCRIPT, settings],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tools'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_kill_at_any_byte_leaves_no_output(
    tmp_path: Path, shards: list[str], merged: dict[str, bytes]
) -> None:
    flags = ("--input", *shards, "--output-prefix", tmp_path / "out")
    largest = max(map(len, merged.values()))
    for limit in (0, 1, largest // 3, 2 * largest // 3, largest - 1):
        killed = run_limited(limit, *flags, kill=True)
        assert killed.returncode == -signal.SIGXFSZ, killed.stderr
        assert not list(tmp_path.glob("out.bin")) and not list(tmp_path.glob("out.idx"))
    assert run(*flags) == 0
    assert content(tmp_path / "out") == merged
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_no_file(tmp_path: Path, shards: list[str]) -> None:
    flags = ("--input", *shards, "--output-prefix", tmp_path / "out")
    for limit in (500, 1500):
        process = run_limited(limit, *flags, kill=False)
        assert process.returncode == 2, process.stderr
        assert "has no room for out.bin (File too large); free some" in process.stderr
        assert process.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())


def test_a_second_run_of_a_prefix_is_refused(tmp_path: Path, shards: list[str]) -> None:
    indices = [open_index(shard) for shard in shards]
    results = []

    def start_second_run(num_bytes: int) -> None:
        process = run_limited(
            1 << 30, "--input", shards[0], "--output-prefix", tmp_path / "out", kill=False
        )
        results.append((process.returncode, process.stderr))

    merge(indices[:1], str(tmp_path / "out"), progress=start_second_run)
    assert len(results) == 1 and results[0][0] == 2
    assert "out.bin.partial is being written by another run; wait for its end" in results[0][1]
    assert content(tmp_path / "out") == content(shards[0])


def test_a_data_set_that_changes_during_the_merge_is_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [[[1] * 100]])
    indices = [open_index(prefix)]
    os.truncate(prefix + ".bin", 50)
    with pytest.raises(ConfigError, match=r"a\.bin changed while it was read"):
        merge(indices, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("result", [OSError(errno.EXDEV, "Invalid cross-device link"), 0])
def test_a_fallback_copies_without_copy_file_range(
    tmp_path: Path,
    shards: list[str],
    merged: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    result: OSError | int,
) -> None:
    def copy_nothing(*arguments: object) -> int:
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(os, "copy_file_range", copy_nothing)
    assert run("--input", *shards, "--output-prefix", tmp_path / "out") == 0
    assert content(tmp_path / "out") == merged
