"""The tokenizer: Megatron loads it, nothing of a text is lost, and bad input leaves nothing."""

from pathlib import Path

import pytest
import train_tokenizer
from tokenizers import Tokenizer, pre_tokenizers

from megatron_sffn.errors import ConfigError


def test_command_and_rerun(tmp_path, texts, write_lines, start_tool):
    source = write_lines(tmp_path / "a.jsonl", [{"body": text} for text in texts * 5])
    arguments = ["--input", source, "--json-key", "body", "--vocab-size", 300]
    arguments += ["--output", tmp_path / "new" / "tok"]
    process = start_tool("train_tokenizer.py", *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "300 ids" in out and "bytes per token" in out
    assert "trained on" in err

    folder = tmp_path / "new" / "tok"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["tokenizer.json", "tokenizer_config.json"]
    (folder / "notes").write_text("mine")
    stale = folder.with_name(".tok.0.partial")
    stale.mkdir()

    assert train_tokenizer.main([str(argument) for argument in arguments]) == 0
    assert {name: (folder / name).read_bytes() for name in first} == first
    arguments[arguments.index(300)] = 310
    assert train_tokenizer.main([str(argument) for argument in arguments]) == 0
    assert (folder / "tokenizer.json").read_bytes() != first["tokenizer.json"]
    assert (folder / "notes").read_text() == "mine"
    assert list(folder.parent.iterdir()) == [folder]


def test_megatron_loads_it(tokenizer_folder, build_tokenizer, texts):
    tokenizer = build_tokenizer(tokenizer_folder)
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert tokenizer.vocab_size == raw.get_vocab_size() > train_tokenizer.SMALLEST_VOCAB
    assert tokenizer.eod == raw.token_to_id("<|endoftext|>") == 0
    assert tokenizer.pad == raw.token_to_id("<|padding|>") == 1
    for text in [*texts, "", "".join(texts), "\U0010ffff\u0378"]:
        ids = tokenizer.tokenize(text)
        assert ids == raw.encode(text).ids
        assert tokenizer.detokenize(ids) == text
        assert not {0, 1} & set(ids)


def test_all_bytes_are_tokens(tokenizer_folder):
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ids = {raw.token_to_id(symbol) for symbol in pre_tokenizers.ByteLevel.alphabet()}
    assert len(ids) == 256 and None not in ids


def test_plain_text_keeps_line_ends(tmp_path):
    text = "one\r\n\r\ntwo\n\n\nthree " * 100_000
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(train_tokenizer.read_texts([str(path)], "text"))
    assert len(pieces) > 1
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n', ["--vocab-size", "257"], "257 has no room.*at least 258"),
        ("a.jsonl", b'{"text": "x"}\n', ["--min-frequency", "0"], "--min-frequency 0"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', [], r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n', ["--json-key", "t"], r"line 1 .* no key 't' \(it has text"),
        ("a.jsonl", b"", [], "holds no text"),
        ("a.txt", b"\xff\xfe", [], "is not UTF-8"),
        ("a.jsonl.gz", b"", [], "is compressed"),
        ("a.jsonl", b"{}", ["--output", __file__], "is a file"),
    ],
)
def test_bad_input(tmp_path, name, content, arguments, message):
    path = tmp_path / name
    path.write_bytes(content)
    output = ["--output", str(tmp_path / "out" / "tok")]
    with pytest.raises(ConfigError, match=message):
        train_tokenizer.main(["--input", str(path), *output, *arguments])
    assert list(tmp_path.iterdir()) == [path]


def test_missing_input(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        train_tokenizer.main(["--input", str(tmp_path / "no"), "--output", str(tmp_path / "tok")])
    with pytest.raises(ConfigError, match="is a folder"):
        train_tokenizer.main(["--input", str(tmp_path), "--output", str(tmp_path / "tok")])
