"""Index files equal Megatron's byte for byte, and every entry is checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_sffn.data.indexed import format as index_format
from megatron_sffn.data.indexed.format import DTYPES, IndexWriter, check_index, open_index
from megatron_sffn.utils.errors import ConfigError
from tests.support.dataset_pairs import random_documents, write_pair

DOCUMENTS = [[[1, 2], [3]], [], [[4, 5, 6]], [[7]]]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture(params=[1, 3, 1 << 20])
def piece_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set how many entries are in memory at once; results must not depend on it."""
    monkeypatch.setattr(index_format, "PIECE", request.param)


def test_dtype_codes_are_those_of_megatron() -> None:
    ids = {code for code in DType if not code.name.startswith("float")}
    assert {code.value: numpy.dtype(code.name).str for code in ids} == {
        code: numpy.dtype(name).str for code, name in DTYPES.items()
    }


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.int32, numpy.int64])
def test_an_index_of_megatron_is_read(tmp_path: Path, dtype: Any) -> None:
    index = open_index(write_pair(tmp_path / "a", DOCUMENTS, dtype))
    check_index(index)
    assert (index.num_documents, index.num_sequences, index.num_tokens) == (4, 4, 7)
    assert index.dtype == dtype and index.num_bytes == Path(index.bin).stat().st_size
    assert index.offsets(0, 4).tolist() == [0, 3, 3, 6, 7]
    assert index.offsets(2, 3).tolist() == [3, 6]
    dataset = IndexedDataset(index.prefix)
    assert index.lengths.tolist() == dataset.sequence_lengths.tolist()
    assert index.pointers.tolist() == dataset.index.sequence_pointers.tolist()
    assert index.documents.tolist() == dataset.document_indices.tolist()


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_an_index_without_sequences_can_be_read(
    tmp_path: Path, documents: list[list[list[int]]]
) -> None:
    index = open_index(write_pair(tmp_path / "a", documents))
    check_index(index)
    assert (index.num_documents, index.num_tokens) == (len(documents), 0)
    assert index.offsets(0, len(documents)).tolist() == [0] * (len(documents) + 1)


def test_reading_an_index_leaves_no_file_open(tmp_path: Path) -> None:
    open_files_before = len(list(Path("/proc/self/fd").iterdir()))
    indices = [open_index(write_pair(tmp_path / f"{number}", DOCUMENTS)) for number in range(5)]
    for index in indices:
        check_index(index)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files_before


@pytest.mark.usefixtures("piece_size")
@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_a_written_index_equals_megatrons(tmp_path: Path, dtype: Any) -> None:
    prefix = write_pair(tmp_path / "a", random_documents(50), dtype)
    index = open_index(prefix)
    check_index(index)
    with closing(IndexWriter(numpy.dtype(dtype), tmp_path)) as writer:
        for first, last in zip(index.documents[:-1], index.documents[1:], strict=True):
            writer.add_sequences(index.lengths[first:last])
            writer.end_documents(numpy.array([writer.num_sequences]))
        writer.finish(tmp_path / "b.idx")
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.idx"]


def edit_file(path: str, edit: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(edit(Path(path).read_bytes()))


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_missing_file_is_refused(tmp_path: Path, ending: str) -> None:
    prefix = write_pair(tmp_path / "a", DOCUMENTS)
    Path(prefix + ending).unlink()
    with pytest.raises(ConfigError, match=rf"a\{ending} does not exist; give the path of PREFIX"):
        open_index(prefix)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda data: b"", "no index"),
        (lambda data: b"MMIDIDX", "no index"),
        (lambda data: b"garbage!" * 40, "no index"),
        (lambda data: data[:9] + b"\2" + data[10:], "no index"),  # another version
        (lambda data: data[:17] + b"\x63" + data[18:], "no index"),  # an unknown dtype
        (lambda data: data[:17] + b"\6" + data[18:], "no index"),  # floats are no ids
        (lambda data: data[:-8], "truncated"),
        (lambda data: data[:34], "truncated"),
        (lambda data: data + b"\0", "truncated"),
        (lambda data: data[:18] + bytes(16), "truncated"),  # not even one bound of documents
    ],
    ids=["empty", "head", "garbage", "version", "dtype", "floats", "tail", "body", "longer", "no"],
)
def test_an_unusable_index_is_refused(
    tmp_path: Path, edit: Callable[[bytes], bytes], problem: str
) -> None:
    prefix = write_pair(tmp_path / "a", DOCUMENTS)
    edit_file(prefix + ".idx", edit)
    with pytest.raises(ConfigError, match=rf"a\.idx is {problem}; make .*preprocess_data\.py"):
        open_index(prefix)


def test_a_multimodal_data_set_is_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=numpy.uint16, multimodal=True)
    builder.add_document(numpy.array([1, 2, 3]), [1, 2], [0, 1])
    builder.finalize(f"{tmp_path}/a.idx")
    with pytest.raises(ConfigError, match=r"a\.idx has a mode .* multimodal; give sets of text"):
        open_index(f"{tmp_path}/a")


@pytest.mark.parametrize("edit", [lambda data: data[:-2], lambda data: data + b"\0\0"])
def test_ids_that_do_not_fit_the_index_are_refused(
    tmp_path: Path, edit: Callable[[bytes], bytes]
) -> None:
    prefix = write_pair(tmp_path / "a", DOCUMENTS)
    edit_file(prefix + ".bin", edit)
    message = f"has {len(edit(bytes(14)))} bytes, but its index says 14"
    with pytest.raises(ConfigError, match=rf"a\.bin {message}; .*preprocess_data\.py"):
        open_index(prefix)


def replace_entry(offset: int, dtype: str, value: int) -> Callable[[bytes], bytes]:
    """An edit that replaces one number of an index."""
    raw = numpy.array([value], dtype).tobytes()
    return lambda data: data[:offset] + raw + data[offset + len(raw) :]


# The index of DOCUMENTS: 4 lengths from 34 on, 4 pointers from 50, 5 documents from 82.
@pytest.mark.usefixtures("piece_size")
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (replace_entry(38, "<i4", 2), "sequences do not follow"),
        (replace_entry(38, "<i4", -1), "sequences do not follow"),
        (replace_entry(58, "<i8", 6), "sequences do not follow"),
        (replace_entry(50, "<i8", 2), "sequences do not follow"),
        (replace_entry(82, "<i8", 1), "do not hold all"),
        (replace_entry(82, "<i8", -1), "not in the order"),
        (replace_entry(114, "<i8", 3), "do not hold all"),
        (replace_entry(98, "<i8", 1), "not in the order"),
    ],
)
def test_wrong_entries_are_refused(
    tmp_path: Path, edit: Callable[[bytes], bytes], problem: str
) -> None:
    prefix = write_pair(tmp_path / "a", DOCUMENTS)
    edit_file(prefix + ".idx", edit)
    index = open_index(prefix)
    with pytest.raises(ConfigError, match=rf"a\.idx is damaged, its .*{problem}.*; make"):
        check_index(index)
