"""The look at tokenizer and data before anything starts: good sets pass, others get a sentence."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sffn.data import gpt
from megatron_sffn.data.gpt import check_data, check_dataset
from megatron_sffn.errors import ConfigError

VOCAB = 100

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it Megatron's logging warns that it does not know the rank."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, documents)`: the prefix of a data set with these lists of ids."""

    def make(name: str = "set", *documents: list[int], dtype: Any = numpy.uint16) -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        for document in documents or ([1, 2, 99], [3]):
            builder.add_document(numpy.array(document), [len(document)])
        builder.finalize(prefix + ".idx")
        return prefix

    return make


def change(path: str, edit: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(edit(Path(path).read_bytes()))


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.int32, numpy.int64])
def test_a_good_set_passes(write: Write, dtype: Any) -> None:
    check_dataset(write("set", [0, 1, 99], [5], [6, 7], dtype=dtype), VOCAB)


def test_documents_of_several_sequences_and_empty_ones_pass(tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    builder.add_document(numpy.arange(6), [2, 4])
    builder.add_document(numpy.array([], dtype=numpy.uint16), [])
    builder.finalize(prefix + ".idx")
    check_dataset(prefix, VOCAB)


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_missing_file(write: Write, ending: str) -> None:
    prefix = write()
    Path(prefix + ending).unlink()
    with pytest.raises(ConfigError, match=rf"{prefix}\{ending} does not exist; check --data-path"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize("edit", [lambda data: data[:-2], lambda data: data + b"\0\0"])
def test_tokens_and_index_that_differ(write: Write, edit: Callable[[bytes], bytes]) -> None:
    prefix = write()
    change(prefix + ".bin", edit)
    sizes = f"has {len(edit(bytes(8)))} bytes, but its index says 8"
    with pytest.raises(ConfigError, match=rf"{prefix}\.bin {sizes}; .*preprocess_data\.py"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda data: b"", "no index"),
        (lambda data: b"MMIDIDX", "no index"),
        (lambda data: b"garbage!" * 40, "no index"),
        (lambda data: data[:9] + b"\2" + data[10:], "no index"),  # another version
        (lambda data: data[:17] + b"\x63" + data[18:], "no index"),  # an unknown dtype
        (lambda data: data[:-8], "truncated"),
        (lambda data: data[:34], "truncated"),
        (lambda data: data + b"\0", "truncated"),
    ],
    ids=["empty", "head", "garbage", "version", "dtype", "tail", "body", "longer"],
)
def test_an_unusable_index(write: Write, edit: Callable[[bytes], bytes], what: str) -> None:
    prefix = write()
    change(prefix + ".idx", edit)
    with pytest.raises(ConfigError, match=rf"{prefix}\.idx is {what}; make .*preprocess_data\.py"):
        check_dataset(prefix, VOCAB)


def test_an_empty_set(tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16).finalize(prefix + ".idx")
    with pytest.raises(ConfigError, match=rf"{prefix}\.bin is empty; give it documents"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize(
    ("documents", "found"),
    [(([100, 1], [2, 3]), "1 to 100"), (([1, 2], [3, 100]), "1 to 100"), (([4, -1],), "-1 to 4")],
)
def test_ids_outside_the_vocabulary(
    write: Write, documents: tuple[list[int], ...], found: str
) -> None:
    prefix = write("set", *documents, dtype=numpy.int32)
    with pytest.raises(
        ConfigError, match=rf"{prefix} holds token ids {found}, .* 100 ids; use .*--tokenizer-model"
    ):
        check_dataset(prefix, VOCAB)


def test_both_ends_of_a_large_set_are_looked_at(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "SAMPLED_TOKENS", 2)
    check_dataset(write("middle", [1, 2, 500, 3, 4]), VOCAB)
    for ids in ([1, 500, 2, 3, 4], [1, 2, 3, 500, 4]):
        with pytest.raises(ConfigError, match="500"):
            check_dataset(write("end", ids), VOCAB)


def arguments(**given: Any) -> Namespace:
    """Megatron's namespace, as far as tokenizer and data are concerned."""
    from megatron.training.config import TokenizerConfig

    flags: dict[str, Any] = dict.fromkeys(TokenizerConfig.__dataclass_fields__)
    flags |= dict.fromkeys(
        [
            "data_path",
            "data_args_path",
            "train_data_path",
            "valid_data_path",
            "test_data_path",
            "per_split_data_args_path",
        ]
    )
    flags |= {"mock_data": False, "rank": 0, "metadata_path": None}
    flags |= {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB}
    return Namespace(**flags | given)


def test_data_is_needed() -> None:
    with pytest.raises(ConfigError, match="no data set was given; pass --data-path PREFIX"):
        check_data(arguments())


def test_mock_data_needs_none() -> None:
    check_data(arguments(mock_data=True))


@pytest.mark.parametrize("given", [{}, {"mock_data": True}])
def test_a_tokenizer_is_needed(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-type is not given .* use:"):
        check_data(arguments(tokenizer_type=None, **given))


def test_the_folder_of_the_tokenizer_is_needed(tmp_path: Path) -> None:
    missing = str(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=rf"--tokenizer-model {missing} does not exist; give"):
        check_data(arguments(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=missing))


@pytest.mark.parametrize(
    "flag", ["data_path", "data_args_path", "train_data_path", "per_split_data_args_path"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_set_of_a_blend_is_looked_at(
    write: Write, tmp_path: Path, flag: str, weighted: bool
) -> None:
    good, also_good, bad = write("good"), write("also-good"), write("bad", [1, 1000])

    def given(*prefixes: str) -> Namespace:
        blend = [word for prefix in prefixes for word in ("0.5", prefix)]
        blend = blend if weighted else list(prefixes)
        if flag in ("data_path", "train_data_path"):
            return arguments(**{flag: blend})
        file = tmp_path / "list"
        splits = {"train": " ".join(blend), "valid": [good], "test": [good]}
        file.write_text(" ".join(blend) if flag == "data_args_path" else json.dumps(splits))
        return arguments(**{flag: str(file)})

    check_data(given(good, also_good))
    with pytest.raises(ConfigError, match=f"{bad} holds token ids 1 to 1000"):
        check_data(given(good, bad))


@pytest.mark.parametrize("flag", ["train_data_path", "valid_data_path", "test_data_path"])
def test_every_split_is_looked_at(write: Write, flag: str) -> None:
    write()
    with pytest.raises(ConfigError, match=r"nowhere\.idx does not exist"):
        check_data(arguments(**{flag: ["nowhere"]}))


@pytest.mark.parametrize("weight", ["0", "-1", "nan"])
def test_a_weight_that_is_not_positive(write: Write, weight: str) -> None:
    with pytest.raises(ConfigError, match=rf"{weight}.* is not positive; leave out"):
        check_data(arguments(data_path=["1", write("a"), weight, write("b")]))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data_path": ["a", "b", "1", "c"]}, "AssertionError"),
        ({"data_args_path": "no-such-file"}, "no-such-file"),
        ({"per_split_data_args_path": "no-such-file"}, "no-such-file"),
        ({"per_split_data_args_path": "/dev/null"}, "JSONDecodeError"),
    ],
)
def test_lists_that_cannot_be_read(given: dict[str, Any], named: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"cannot be read .*{named}.*; give --data-path PREFIX"
    ) as error:
        check_data(arguments(**given))
    assert "\n" not in str(error.value)


def test_nothing_is_written(write: Write, tmp_path: Path) -> None:
    prefix = write()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    check_data(arguments(data_path=[prefix]))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
