"""Megatron loads trained tokenizers, which lose no text; bad input leaves no file."""

import gzip

import pyarrow
import pytest
import train_tokenizer
from pyarrow import parquet
from tokenizers import Tokenizer, pre_tokenizers

from megatron_sffn.data.text.sources import find_sources
from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS


def test_a_second_run_gives_the_same_files(tmp_path, texts, write_lines, start_tool):
    source = write_lines(tmp_path / "a.jsonl", [{"body": text} for text in texts * 5])
    arguments = ["--input", source, "--json-key", "body", "--vocab-size", 300]
    arguments += ["--output", tmp_path / "new" / "tok"]
    process = start_tool("train_tokenizer.py", *arguments)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert "300 ids" in stdout and "bytes per token" in stdout
    assert "trained on" in stderr

    folder = tmp_path / "new" / "tok"
    first_files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first_files) == ["tokenizer.json", "tokenizer_config.json"]
    (folder / "notes").write_text("mine")
    stale = folder.with_name(".tok.0.partial")
    stale.mkdir()

    assert train_tokenizer.main([str(argument) for argument in arguments]) == 0
    assert {name: (folder / name).read_bytes() for name in first_files} == first_files
    arguments[arguments.index(300)] = 310
    assert train_tokenizer.main([str(argument) for argument in arguments]) == 0
    assert (folder / "tokenizer.json").read_bytes() != first_files["tokenizer.json"]
    assert (folder / "notes").read_text() == "mine"
    assert list(folder.parent.iterdir()) == [folder]


def test_megatron_loads_a_trained_tokenizer(tokenizer_folder, build_tokenizer, texts):
    tokenizer = build_tokenizer(tokenizer_folder)
    trained = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert tokenizer.vocab_size == trained.get_vocab_size() > train_tokenizer.SMALLEST_VOCAB
    assert tokenizer.eod == trained.token_to_id("<|endoftext|>") == 0
    assert tokenizer.pad == trained.token_to_id("<|padding|>") == 1
    for text in [*texts, "", "".join(texts), "\U0010ffff\u0378"]:
        ids = tokenizer.tokenize(text)
        assert ids == trained.encode(text).ids
        assert tokenizer.detokenize(ids) == text
        assert not {0, 1} & set(ids)


def test_every_byte_is_a_token_of_a_trained_tokenizer(tokenizer_folder):
    trained = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ids = {trained.token_to_id(symbol) for symbol in pre_tokenizers.ByteLevel.alphabet()}
    assert len(ids) == 256 and None not in ids


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_line_ends_of_plain_text_are_kept(tmp_path, ending):
    text = "one\r\n\r\ntwo\n\n\nthree " * 100_000
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending == ".txt.gz" else text.encode())
    pieces = list(train_tokenizer.read_texts(find_sources([str(path)], ["text"]), "text"))
    assert len(pieces) > 1
    assert "".join(pieces) == text


def test_every_kind_of_input_is_read(tmp_path, texts, write_lines):
    (tmp_path / "in").mkdir()
    lines = write_lines(tmp_path / "in" / "a.jsonl", [{"body": text} for text in texts])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    table = pyarrow.table({"body": texts, "other": texts})
    parquet.write_table(table, tmp_path / "in" / "c.parquet")
    write_lines(tmp_path / "in" / "d.jsonl", [{"body": texts}])
    (tmp_path / "in" / "e.txt").write_text("plain")
    sources = find_sources([str(tmp_path / "in")], ["body"])
    assert list(train_tokenizer.read_texts(sources, "body")) == [*texts * 4, "plain"]


def test_a_byte_tokenizer_has_the_bytes_as_ids(tmp_path, build_tokenizer, texts, capsys):
    assert train_tokenizer.main(["--bytes", "--output", str(tmp_path / "bytes")]) == 0
    assert "bytes: 258 ids, one per byte and two more" in capsys.readouterr().out
    tokenizer = build_tokenizer(tmp_path / "bytes")
    for text in texts:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize(list(text.encode())) == text
    assert (tokenizer.eod, tokenizer.pad) == (256, 257)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n', ["--vocab-size", "257"], "257 has no room.*at least 258"),
        ("a.jsonl", b'{"text": "x"}\n', ["--min-frequency", "0"], "--min-frequency 0"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', [], r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n', ["--json-key", "t"], r"line 1 .* no key 't' \(it has text"),
        ("a.jsonl", b"", [], "holds no text"),
        ("a.txt", b"\xff", [], r"a\.txt is not UTF-8"),
        ("a.txt", b"a\x00b", [], r"a\.txt holds a NUL"),
        ("a.jsonl.gz", b"no archive", [], r"a\.jsonl\.gz is truncated or damaged after line 0"),
        ("a.txt.gz", b"no archive", [], r"a\.txt\.gz is truncated or damaged"),
        ("a.parquet", b"no parquet", [], "is no Parquet file"),
        ("a.jsonl", b"{}", ["--bytes"], "--bytes trains nothing on --input .*; leave one of them"),
        ("a.jsonl", b"{}", ["--output", __file__], "is a file"),
    ],
)
def test_bad_input_is_refused(tmp_path, name, content, arguments, message):
    path = tmp_path / name
    path.write_bytes(content)
    output = ["--output", str(tmp_path / "out" / "tok")]
    with pytest.raises(ConfigError, match=message):
        train_tokenizer.main(["--input", str(path), *output, *arguments])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "no"], "--input no does not exist"),
        (["--input", "."], "--input . is a folder without text"),
        ([], "--input is not given, and a tokenizer is trained on text; give files"),
    ],
)
def test_missing_input_is_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train_tokenizer.main([*flags, "--output", "tok"])
    assert list(tmp_path.iterdir()) == []
