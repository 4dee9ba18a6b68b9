"""Checks of flags, tokenizer and data: good input passes, bad input is refused in a sentence."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sffn.checks import data
from megatron_sffn.checks.data import REFUSED, check_data, check_dataset
from megatron_sffn.utils.errors import ConfigError
from tests.support.preprocess_runs import END, VOCAB, namespace, write_dataset

Write = Callable[..., str]
Arguments = Callable[..., Namespace]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the rank: Megatron's logging warns if it does not know it."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, documents)`: the prefix of a data set with these lists of ids."""

    def make(name: str = "set", *documents: list[int], dtype: Any = numpy.uint16) -> str:
        return write_dataset(tmp_path / name, documents or ([1, 2, 99], [3]), dtype)

    return make


def change(path: str, edit: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(edit(Path(path).read_bytes()))


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.int32, numpy.int64])
def test_a_valid_data_set_passes(write: Write, dtype: Any) -> None:
    index = check_dataset(write("set", [0, 1, 99], [5], [6, 7], dtype=dtype), VOCAB)
    assert index.num_tokens == 6


def test_documents_of_several_sequences_and_empty_ones_pass(tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    builder.add_document(numpy.arange(6), [2, 4])
    builder.add_document(numpy.array([], dtype=numpy.uint16), [])
    builder.finalize(prefix + ".idx")
    check_dataset(prefix, VOCAB)


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_missing_file_is_refused(write: Write, ending: str) -> None:
    prefix = write()
    Path(prefix + ending).unlink()
    with pytest.raises(ConfigError, match=rf"{prefix}\{ending} does not exist; give the path"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize("edit", [lambda data: data[:-2], lambda data: data + b"\0\0"])
def test_tokens_that_do_not_fit_the_index_are_refused(
    write: Write, edit: Callable[[bytes], bytes]
) -> None:
    prefix = write()
    change(prefix + ".bin", edit)
    sizes = f"has {len(edit(bytes(8)))} bytes, but its index says 8"
    with pytest.raises(ConfigError, match=rf"{prefix}\.bin {sizes}; .*preprocess_data\.py"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize(
    ("edit", "problem"),
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
def test_a_damaged_index_is_refused(
    write: Write, edit: Callable[[bytes], bytes], problem: str
) -> None:
    prefix = write()
    change(prefix + ".idx", edit)
    with pytest.raises(
        ConfigError, match=rf"{prefix}\.idx is {problem}; make .*preprocess_data\.py"
    ):
        check_dataset(prefix, VOCAB)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "set", [])
    with pytest.raises(ConfigError, match=rf"{prefix}\.bin is empty; give it documents"):
        check_dataset(prefix, VOCAB)


@pytest.mark.parametrize(
    ("documents", "id_range"),
    [(([100, 1], [2, 3]), "1 to 100"), (([1, 2], [3, 100]), "1 to 100"), (([4, -1],), "-1 to 4")],
)
def test_ids_outside_the_vocabulary_are_refused(
    write: Write, documents: tuple[list[int], ...], id_range: str
) -> None:
    prefix = write("set", *documents, dtype=numpy.int32)
    with pytest.raises(
        ConfigError,
        match=rf"{prefix} holds token ids {id_range}, .* 100 ids; use .*--tokenizer-model",
    ):
        check_dataset(prefix, VOCAB)


def test_both_ends_of_a_large_data_set_are_checked(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SAMPLED_TOKENS", 2)
    check_dataset(write("middle", [1, 2, 500, 3, 4]), VOCAB)
    for ids in ([1, 500, 2, 3, 4], [1, 2, 3, 500, 4]):
        with pytest.raises(ConfigError, match="500"):
            check_dataset(write("end", ids), VOCAB)


@pytest.fixture(scope="module")
def validated() -> Namespace:
    """The namespace of a run on sequences of two tokens, without data."""
    return namespace("--seq-length 2 --micro-batch-size 1 --train-iters 1 --eval-iters 0")


@pytest.fixture
def arguments(validated: Namespace) -> Arguments:
    """`arguments(dest=value)`: the namespace of that run with other flags."""

    def make(**flags: Any) -> Namespace:
        if "data_path" in flags or "data_args_path" in flags:
            flags = {"split": "1,0,0", **flags}
        return Namespace(**{**vars(validated), **flags})

    return make


def test_a_run_without_data_is_refused(arguments: Arguments) -> None:
    with pytest.raises(ConfigError, match="no data set was given; pass --data-path PREFIX"):
        check_data(arguments())


def test_mock_data_needs_no_data_set(arguments: Arguments) -> None:
    check_data(arguments(mock_data=True, eval_iters=5))


@pytest.mark.parametrize("flags", [{}, {"mock_data": True}])
def test_a_run_without_a_tokenizer_is_refused(arguments: Arguments, flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-type is not given .* use:"):
        check_data(arguments(tokenizer_type=None, **flags))


def test_a_missing_folder_of_the_tokenizer_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    missing = str(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=rf"--tokenizer-model {missing} does not exist; give"):
        check_data(arguments(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=missing))


@pytest.mark.parametrize(
    "flag", ["data_path", "data_args_path", "train_data_path", "per_split_data_args_path"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_data_set_of_a_blend_is_checked(
    arguments: Arguments, write: Write, tmp_path: Path, flag: str, weighted: bool
) -> None:
    good, also_good, bad = write("good"), write("also-good"), write("bad", [1, 1000])

    def blend_args(*prefixes: str) -> Namespace:
        blend = [word for prefix in prefixes for word in ("0.5", prefix)]
        blend = blend if weighted else list(prefixes)
        if flag in ("data_path", "train_data_path"):
            return arguments(**{flag: blend})
        file = tmp_path / "list"
        splits = {"train": " ".join(blend), "valid": [good], "test": [good]}
        file.write_text(" ".join(blend) if flag == "data_args_path" else json.dumps(splits))
        return arguments(**{flag: str(file)})

    check_data(blend_args(good, also_good))
    with pytest.raises(ConfigError, match=f"{bad} holds token ids 1 to 1000"):
        check_data(blend_args(good, bad))


@pytest.mark.parametrize("flag", ["train_data_path", "valid_data_path", "test_data_path"])
def test_every_split_is_checked(arguments: Arguments, write: Write, flag: str) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.idx does not exist"):
        check_data(arguments(**{"train_data_path": [write()], flag: ["nowhere"]}))


@pytest.mark.parametrize("weight", ["0", "-1", "nan"])
def test_a_weight_that_is_not_positive_is_refused(
    arguments: Arguments, write: Write, weight: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{weight}.* is not positive; leave out"):
        check_data(arguments(data_path=["1", write("a"), weight, write("b")]))


@pytest.mark.parametrize("weights", [("inf", "1"), ("1e400", "1"), ("1e308", "1e308")])
def test_weights_without_a_finite_sum_are_refused(
    arguments: Arguments, write: Write, weights: tuple[str, str]
) -> None:
    blend = [weights[0], write("a"), weights[1], write("b")]
    for flag in ("data_path", "train_data_path"):
        with pytest.raises(ConfigError, match=r"has weights without a finite sum; give smaller"):
            check_data(arguments(**{flag: blend}))


@pytest.mark.parametrize(
    ("flag", "content", "sentence"),
    [
        ("data_args_path", None, r"FILE cannot be read \(No such file"),
        ("data_args_path", "", r"FILE is empty; give PREFIX, or"),
        ("data_args_path", "# a list\nset", "FILE holds #, and every word .*; remove them"),
        ("data_args_path", "1 'set'", "FILE holds 'set', and every word .*; remove them"),
        ("data_args_path", "0.5 set other", r"some data sets only \(0.5 is one\); give one before"),
        ("data_args_path", "set 0.5 other last", r"some data sets only \(0.5 is one\); give"),
        ("per_split_data_args_path", None, r"FILE cannot be read \(No such file"),
        ("per_split_data_args_path", "", r"FILE is not JSON .*; write"),
        ("per_split_data_args_path", "[]", r"FILE has no 'train', 'valid', 'test'; write"),
        (
            "per_split_data_args_path",
            '{"train": ["set"], "valid": null}',
            "FILE has no 'test'; write .*, with null where a split has no data",
        ),
        (
            "per_split_data_args_path",
            '{"train": [0.5, "set"], "valid": null, "test": null}',
            "FILE has under 'train' no list of strings; write weights as strings",
        ),
    ],
)
def test_lists_that_cannot_be_read_are_refused(
    arguments: Arguments, tmp_path: Path, flag: str, content: str | None, sentence: str
) -> None:
    file = tmp_path / "list"
    if content is not None:
        file.write_text(content)
    flag_and_file = f"--{flag.replace('_', '-')} {file}"
    with pytest.raises(ConfigError, match=sentence.replace("FILE", flag_and_file)) as error:
        check_data(arguments(**{flag: str(file)}))
    assert "\n" not in str(error.value)


def test_weights_for_some_data_sets_only_are_refused(arguments: Arguments) -> None:
    with pytest.raises(ConfigError, match=r"--data-path has weights for some .* \(1 is one\)"):
        check_data(arguments(data_path=["a", "b", "1", "c"]))


def test_a_data_set_that_is_trained_on_and_held_out_gives_a_warning(
    arguments: Arguments, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, valid = write("train"), write("valid")
    check_data(arguments(train_data_path=[train], valid_data_path=[valid]))
    assert capsys.readouterr().err == ""
    same_path = f"{tmp_path}/../{tmp_path.name}/train"
    check_data(arguments(train_data_path=["1", train, "1", valid], valid_data_path=[same_path]))
    assert (
        f"warning: data set {same_path} is in --train-data-path and in --valid-data-path, so"
        in (capsys.readouterr().err)
    )


def test_flags_about_document_ends_give_a_warning_if_the_data_has_none(
    arguments: Arguments, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with_ends, without_ends = write("with", [1, 2, END], [3]), write("without", [1, 2, 3])
    check_data(arguments(data_path=[with_ends], eod_mask_loss=True))
    check_data(arguments(data_path=[without_ends]))
    assert capsys.readouterr().err == ""
    check_data(arguments(data_path=[without_ends], eod_mask_loss=True, reset_attention_mask=True))
    assert (
        f"warning: data set {without_ends} does not hold the end-of-document id {END} in its first "
        "and last tokens, and --reset-attention-mask, --eod-mask-loss act at it alone; make it "
        "with --append-eod\n" == capsys.readouterr().err
    )


def test_the_checks_write_nothing(arguments: Arguments, write: Write, tmp_path: Path) -> None:
    prefix = write()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    check_data(arguments(data_path=[prefix]))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dest", REFUSED)
def test_flags_without_an_effect_are_refused(arguments: Arguments, dest: str) -> None:
    flag = "--" + dest.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} is not available, "):
        check_data(arguments(**{dest: True, "mock_data": True}))


def test_an_external_dataloader_is_refused(arguments: Arguments) -> None:
    with pytest.raises(ConfigError, match=r"--dataloader-type external .*; use single or cyclic"):
        check_data(arguments(dataloader_type="external", mock_data=True))


def test_a_run_without_a_length_is_refused(arguments: Arguments) -> None:
    check_data(arguments(train_iters=None, train_samples=5, mock_data=True))
    with pytest.raises(ConfigError, match=r"--train-iters is missing, .*; give it"):
        check_data(arguments(train_iters=None, mock_data=True))


# Splits


TEN = [[1, 2, 3]] * 10
"""Ten documents, each long enough for one sequence of two tokens."""


@pytest.mark.parametrize("split", ["8,1,1", "90,10,0", "100", "0.8,0.1,0.1"])
def test_shares_with_a_sequence_in_each_split_pass(
    arguments: Arguments, write: Write, split: str
) -> None:
    check_data(arguments(data_path=[write("ten", *TEN)], split=split))


@pytest.mark.parametrize(
    ("split", "purpose"),
    [
        ("98,1,1", "validation"),
        ("969, 30, 1", "validation"),
        ("80,19.9,0.1", "testing"),
        ("1,99,0", "training"),
    ],
)
def test_a_share_without_a_document_is_refused(
    arguments: Arguments, write: Write, split: str, purpose: str
) -> None:
    prefix = write("ten", *TEN)
    with pytest.raises(
        ConfigError,
        match=rf"--split {split} leaves for {purpose}, .*{prefix}, 0 tokens, .* needs 3",
    ):
        check_data(arguments(data_path=[prefix], split=split))


def test_a_share_with_less_than_a_sequence_is_refused(arguments: Arguments, write: Write) -> None:
    prefix = write("set", *TEN[:9], [1, 2])
    check_data(arguments(data_path=[prefix], split="8,2,0"))
    with pytest.raises(ConfigError, match=f"validation, .*{prefix}, 2 tokens, .*; give it a large"):
        check_data(arguments(data_path=[prefix], split="9,1,0"))


def test_the_smallest_data_set_of_a_blend_needs_a_sequence_in_each_split(
    arguments: Arguments, write: Write
) -> None:
    large, small = write("large", *TEN * 10), write("small", *TEN)
    check_data(arguments(data_path=[large], split="98,1,1"))
    with pytest.raises(ConfigError, match=f"validation, of data set {small}, 0 tokens"):
        check_data(arguments(data_path=["9", large, "1", small], split="98,1,1"))


def test_a_data_set_of_one_split_with_less_than_a_sequence_is_refused(
    arguments: Arguments, write: Write
) -> None:
    small = write("small", [1, 2])
    with pytest.raises(ConfigError, match=f"{small} of --valid-data-path has 2 tokens, .*; give"):
        check_data(arguments(train_data_path=[write()], valid_data_path=[small]))


def test_weights_of_full_validation_are_refused(arguments: Arguments, write: Write) -> None:
    sets = [write("a", *TEN), write("b", *TEN)]
    check_data(arguments(data_path=sets, split="5,5,0", full_validation=True))
    weighted = ["9", sets[0], "1", sets[1]]
    with pytest.raises(ConfigError, match=r"weights \(9 1\) have nothing to act on; give"):
        check_data(arguments(data_path=weighted, split="5,5,0", full_validation=True))
    check_data(arguments(train_data_path=weighted, valid_data_path=sets, full_validation=True))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"eval_iters": 5}, "--eval-iters 5 reads it; {share}, or use --eval-iters 0"),
        (
            {"full_validation": True},
            "--full-validation reads it; {share}, or leave that out and use --eval-iters 0",
        ),
    ],
)
def test_evaluation_without_data_is_refused(
    arguments: Arguments, write: Write, flags: dict[str, Any], sentence: str
) -> None:
    prefix = write("ten", *TEN)
    check_data(arguments(data_path=[prefix], split="9,1,0", **flags))
    share = sentence.format(share="give it a share, such as --split 98,1,1")
    with pytest.raises(ConfigError, match=f"--split 100,0,0 leaves nothing .*, but {share}"):
        check_data(arguments(data_path=[prefix], split="100,0,0", **flags))
    with pytest.raises(ConfigError, match=r"--valid-data-path is not given, but --.*; give it, or"):
        check_data(arguments(train_data_path=[prefix], **flags))


def test_training_without_data_is_refused(arguments: Arguments, write: Write) -> None:
    prefix = write("ten", *TEN)
    with pytest.raises(ConfigError, match=r"--split 0,1,0 .* training, but .* use --skip-train"):
        check_data(arguments(data_path=[prefix], split="0,1,0"))
    with pytest.raises(ConfigError, match="--train-data-path is not given, but the run trains"):
        check_data(arguments(valid_data_path=[prefix]))
    check_data(arguments(valid_data_path=[prefix], skip_train=True, eval_iters=5))


@pytest.mark.parametrize(
    "split", ["0,0,0", "none", "1,1,1,1", "1.2.3,1,1", "nan,1,1", "inf,1,1", "1e2,1,1"]
)
def test_shares_that_cannot_be_read_are_refused(
    arguments: Arguments, write: Write, split: str
) -> None:
    with pytest.raises(ConfigError, match=f"--split {split} cannot be used; give the shares"):
        check_data(arguments(data_path=[write()], split=split))


def test_data_sets_in_a_file_need_a_split(
    arguments: Arguments, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text(write())
    with pytest.raises(ConfigError, match="--split is not given; give the shares"):
        check_data(arguments(data_args_path=str(tmp_path / "list"), split=None))


def test_shares_of_splits_with_their_own_data_sets_are_refused(
    arguments: Arguments, write: Write
) -> None:
    with pytest.raises(ConfigError, match=r"--split 9,1,0 has nothing to act on, .*; leave it out"):
        check_data(arguments(train_data_path=[write()], split="9,1,0"))


def test_other_flags_that_megatron_does_not_accept_are_refused(
    arguments: Arguments, write: Write
) -> None:
    with pytest.raises(ConfigError, match=r"not accept .*--data-cache-path must be .*; change"):
        check_data(arguments(data_path=[write()], dataloader_defer_npy_index_mmap=True))
