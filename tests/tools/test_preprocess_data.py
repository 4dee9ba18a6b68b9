"""Data sets equal those of Megatron's builder for every kind of input and every engine."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import preprocess_data
import pyarrow
import pytest
from backports import zstd
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet

from megatron_sffn.checks.data import check_dataset
from megatron_sffn.data.text import chunks as text_chunks
from megatron_sffn.data.tokenize import preprocess, workers
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.utils.errors import ConfigError
from tests.support import tokenizers
from tests.support.processes import HANGS
from tests.support.tokenizers import arguments, write_as_megatron

# Other tests may have left threads running; the workers of these tests do not use them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def command_for(source: object, prefix: Path, tokenizer: object, *extra: object) -> list[str]:
    tokenizer_flags = (
        tokenizer if isinstance(tokenizer, list) else tokenizers.hugging_face(tokenizer)
    )
    values = [
        "--input",
        source,
        "--output-prefix",
        prefix,
        "--workers",
        1,
        *tokenizer_flags,
        *extra,
    ]
    return [str(value) for value in values]


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}_*")
    }


def read_report(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tokenizer(build_tokenizer, tokenizer_folder):
    return build_tokenizer(tokenizer_folder)


@pytest.fixture
def documents(texts):
    """Documents of very different lengths, some of them empty."""
    rng = random.Random(0)
    random_texts = [" ".join(rng.choices(texts, k=rng.choice([1, 5, 100]))) for _ in range(300)]
    return ["", *random_texts[:10], "", "", *random_texts[10:], ""]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(workers, "TASK_BYTES", 20_000)
    monkeypatch.setattr(workers, "AHEAD_BYTES", 4 * 20_000)


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("kind", [*tokenizers.KINDS, "large"])
def test_a_data_set_equals_that_of_megatrons_builder(
    tmp_path, kind, append_eod, texts, write_lines
):
    tokenizer_flags = getattr(tokenizers, kind)(tmp_path)
    data_texts = ["1 2", "3", "999 0", "5"] if kind == "null" else ["", *texts, "", *texts, ""]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in data_texts])
    extra = ["--append-eod"] if append_eod else []
    assert (
        preprocess_data.main(command_for(source, tmp_path / "ours", tokenizer_flags, *extra)) == 0
    )

    tokenizer = load_tokenizer(arguments(tokenizer_flags))
    megatron_prefix = tmp_path / "theirs_text_document"
    write_as_megatron(
        megatron_prefix, [[text] for text in data_texts], tokenizer, append_eod=append_eod
    )
    assert files_of(tmp_path, "ours") == files_of(tmp_path, "theirs")
    prefix = str(tmp_path / "ours_text_document")
    check_dataset(prefix, tokenizer.vocab_size)
    assert IndexedDataset(prefix).index.dtype == (np.int32 if kind == "large" else np.uint16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("engine", ["auto", "tokenizers", "megatron"])
def test_all_engines_and_numbers_of_workers_write_the_same_files(
    tmp_path, documents, engine, tokenizer, tokenizer_folder, write_lines
):
    records = [
        {"text": text, "title": text[:9] + str(number)} for number, text in enumerate(documents)
    ]
    source = write_lines(tmp_path / "a.jsonl", records)
    for key in ("text", "title"):
        sequences = [[record[key]] for record in records]
        write_as_megatron(tmp_path / f"m_{key}_document", sequences, tokenizer, append_eod=True)
    for processes in (1, 2, 5):
        extra = ["--append-eod", "--json-keys", "text", "title", "--engine", engine]
        command = command_for(
            source, tmp_path / "out", tokenizer_folder, *extra, "--workers", processes
        )
        assert preprocess_data.main([*command, "--overwrite"]) == 0
        assert files_of(tmp_path, "out") == files_of(tmp_path, "m")


def test_the_command_writes_a_data_set(
    tmp_path, documents, tokenizer_folder, write_lines, start_tool
):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    extra = ["--partitions", 4, "--keep-sequential-samples", "--keep-newlines", "--log-interval", 9]
    command = command_for(source, tmp_path / "two", tokenizer_folder, *extra)
    del command[command.index("--workers") : command.index("--workers") + 2]
    process = start_tool("preprocess_data.py", *command)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert f"two_text_document: {len(documents)} documents" in stdout
    assert "MB/s" in stderr and "M tokens, " in stderr and "%, ETA 0:00:0" in stderr
    assert "ids by gigatoken, which gave those of Megatron's tokenizer on" in stderr
    assert "--keep-newlines concerns --split-sentences" in stderr
    assert len(stderr.splitlines()) < 8
    plain_command = command_for(source, tmp_path / "one", tokenizer_folder)
    assert preprocess_data.main(plain_command) == 0
    assert files_of(tmp_path, "one") == files_of(tmp_path, "two")
    assert sorted(files_of(tmp_path, "one")) == ["_text_document.bin", "_text_document.idx"]


@pytest.mark.usefixtures("small_chunks")
def test_every_kind_of_input_gives_the_same_files(tmp_path, documents, tokenizer_folder):
    documents = [text.replace("\0", "") for text in documents]  # a .txt file may not hold it
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)
    middle = content.index(b"\n", len(content) // 2) + 1
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name, data in {
        "plain/a.jsonl": content,
        "crlf/a.jsonl": b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
        "gz/a.jsonl.gz": gzip.compress(content),
        "bz2/a.json.bz2": bz2.compress(content),
        "xz/a.ndjson.xz": lzma.compress(content),
        "zst/a.jsonl.zst": zstd.compress(content),
        "parts/a1.jsonl": content[:middle],
        "parts/deep/a2.jsonl.gz": gzip.compress(content[middle:]),
    }.items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).write_bytes(data)
    (inputs / "texts").mkdir()
    for number, text in enumerate(documents):
        (inputs / "texts" / f"{number:04}.txt").write_bytes(text.encode())
    (inputs / "rows").mkdir()
    table = pyarrow.table({"n": list(range(len(documents))), "text": documents})
    parquet.write_table(table, inputs / "rows" / "a.parquet", row_group_size=100)

    assert (
        preprocess_data.main(command_for(inputs / "plain", tmp_path / "plain", tokenizer_folder))
        == 0
    )
    expected = files_of(tmp_path, "plain")
    for folder in sorted(set(os.listdir(inputs)) - {"plain"}):
        command = command_for(inputs / folder, tmp_path / folder, tokenizer_folder, "--workers", 2)
        assert preprocess_data.main(command) == 0
        assert files_of(tmp_path, folder) == expected, folder
    glob_command = command_for(inputs / "parts" / "**" / "*", tmp_path / "glob", tokenizer_folder)
    assert preprocess_data.main(glob_command) == 0
    assert files_of(tmp_path, "glob") == expected


def test_standard_input_and_pipes_are_read(
    tmp_path, documents, tokenizer_folder, write_lines, monkeypatch, capsys
):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    assert preprocess_data.main(command_for(source, tmp_path / "file", tokenizer_folder)) == 0
    capsys.readouterr()
    with source.open("rb") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        command = command_for("-", tmp_path / "stdin", tokenizer_folder, "--log-interval", 1)
        assert preprocess_data.main(command) == 0
    stderr = capsys.readouterr().err
    assert "M tokens" in stderr and "ETA" not in stderr
    reader, writer = os.pipe()
    with subprocess.Popen(["cat", str(source)], stdout=writer):
        os.close(writer)
        command = command_for(f"/dev/fd/{reader}", tmp_path / "pipe", tokenizer_folder)
        assert preprocess_data.main(command) == 0
    os.close(reader)
    assert files_of(tmp_path, "stdin") == files_of(tmp_path, "pipe") == files_of(tmp_path, "file")


def test_lists_become_documents_of_several_sequences(
    tmp_path, tokenizer, tokenizer_folder, write_lines
):
    lists = [["one", "", "two words"], "three", [], "", ["four"], [""]]
    source = write_lines(tmp_path / "a.jsonl", [{"text": value} for value in lists])
    command = command_for(source, tmp_path / "ours", tokenizer_folder, "--append-eod")
    assert preprocess_data.main(command) == 0
    sequences = [value if isinstance(value, list) else [value] for value in lists]
    write_as_megatron(tmp_path / "m_text_document", sequences, tokenizer, append_eod=True)
    assert files_of(tmp_path, "ours") == files_of(tmp_path, "m")
    dataset = IndexedDataset(str(tmp_path / "ours_text_document"))
    assert np.diff(dataset.document_indices).tolist() == [2, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("newline_flags", [[], ["--keep-newlines"]])
def test_documents_are_split_into_sentences(
    tmp_path, newline_flags, tokenizer, tokenizer_folder, write_lines, monkeypatch, texts, capsys
):
    import nltk.data
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    from megatron_sffn.data.text.sentences import load_splitter

    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    save_punkt_params(PunktTrainer("A man. A plan! A canal?").get_params(), str(folder / "english"))
    data_texts = ["One. Two!\n\nThree?  Four", "", "  ", *texts]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in data_texts])
    extra = ["--append-eod", "--split-sentences", *newline_flags]
    assert (
        preprocess_data.main(command_for(source, tmp_path / "ours", tokenizer_folder, *extra)) == 0
    )
    split = load_splitter("english", keep_newlines=bool(newline_flags))
    sentences = [split(text) for text in data_texts]
    assert len(sentences[0]) == 4 and sentences[0][1] == ("Two!\n\n" if newline_flags else "Two!")
    write_as_megatron(tmp_path / "m_text_sentence", sentences, tokenizer, append_eod=True)
    assert files_of(tmp_path, "ours") == files_of(tmp_path, "m")
    assert "ours_text_sentence: 11 documents" in capsys.readouterr().out


FAULTY_LINES = {
    b'{"text": "x"': "is not JSON (Expecting ',' delimiter at character 12)",
    b'{"text": "\xff"}': "is not JSON (it is not UTF-8 at byte 10)",
    b'{"text": "a\x00"}': "is not JSON (it holds a NUL at byte 11)",
    b'["x"]': "is a JSON list, not an object",
    b'{"body": "x"}': "has no key 'text' (it has body)",
    b'{"text": 5}': "holds int under 'text', not a string",
    b'{"text": "\\ud83d"}': "holds half of a surrogate pair ('\\ud83d') under 'text', "
    "which is no character",
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("faulty_line", FAULTY_LINES)
def test_a_faulty_document_stops_the_run(
    tmp_path, faulty_line, processes, tokenizer_folder, write_lines
):
    source = write_lines(
        tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, faulty_line, {"text": "c"}]
    )
    command = command_for(source, tmp_path / "out", tokenizer_folder, "--workers", processes)
    with pytest.raises(ConfigError) as error:
        preprocess_data.main(command)
    assert str(error.value).startswith(f"line 3 of {source} {FAULTY_LINES[faulty_line]}")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("processes", [1, 2])
def test_faulty_documents_are_left_out_and_reported(
    tmp_path, processes, documents, tokenizer, tokenizer_folder, write_lines, capsys
):
    records = [{"text": text} for text in documents]
    lines: list[object] = list(records)
    for number, faulty_line in enumerate(FAULTY_LINES):
        lines.insert(number * 43, faulty_line)
    source = write_lines(tmp_path / "a.jsonl", lines)
    truncated = tmp_path / "b.jsonl.gz"
    truncated.write_bytes(gzip.compress(b'{"text": "in the archive"}\n' * 5)[:-5])
    text_file = tmp_path / "c.txt"
    text_file.write_bytes(b"last")
    extra = ["--input", source, truncated, text_file, "--on-error", "skip", "--append-eod"]
    command = command_for(
        source, tmp_path / "out", tokenizer_folder, "--workers", processes, *extra
    )
    assert preprocess_data.main(command) == 0

    report = read_report(tmp_path / "out_errors.jsonl")
    expected = [
        {"file": str(source), "line": number * 43 + 1, "reason": reason}
        for number, reason in enumerate(FAULTY_LINES.values())
    ]
    assert report[:-1] == expected
    assert report[-1]["file"] == str(truncated) and report[-1]["line"] is None
    assert report[-1]["reason"].startswith("is truncated or damaged after line 5 (")
    stdout = capsys.readouterr().out
    assert f"out_text_document: {len(documents) + 6} documents" in stdout
    assert "out_errors.jsonl: 8 documents left out (3 is not JSON, 1 " in stdout
    sequences = [[text] for text in [*documents, *["in the archive"] * 5, "last"]]
    write_as_megatron(tmp_path / "m_text_document", sequences, tokenizer, append_eod=True)
    files = files_of(tmp_path, "out")
    del files["_errors.jsonl"]
    assert files == files_of(tmp_path, "m")


def test_documents_that_the_tokenizer_refuses_are_reported(tmp_path, write_lines):
    tokenizer_flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    id_texts = ["1 2", "one", "3 70000", "4 5 6", "7 -1"]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in id_texts])
    with pytest.raises(ConfigError, match=r"line 2 .* cannot be encoded .*'one'\); remove it"):
        preprocess_data.main(command_for(source, tmp_path / "out", tokenizer_flags))
    assert list(tmp_path.iterdir()) == [source]
    assert (
        preprocess_data.main(
            command_for(source, tmp_path / "out", tokenizer_flags, "--on-error", "skip")
        )
        == 0
    )
    report = read_report(tmp_path / "out_errors.jsonl")
    assert [record["line"] for record in report] == [2, 3, 5]
    assert "ids 3 to 70000 are outside the vocabulary of 100" in report[1]["reason"]
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert [ids.tolist() for ids in dataset] == [[1, 2], [4, 5, 6]]


def test_a_line_that_is_too_long_is_reported(tmp_path, tokenizer_folder, write_lines, monkeypatch):
    long_text = "word " * 20_000_000
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": long_text}, {"text": "b"}])
    command = command_for(source, tmp_path / "out", tokenizer_folder, "--workers", 2)
    assert preprocess_data.main(command) == 0
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert len(dataset) == 3 and dataset.sequence_lengths[1] > 10_000_000
    monkeypatch.setattr(text_chunks, "LONGEST_DOCUMENT", 1_000_000)
    with pytest.raises(ConfigError, match=f"line 2 of {source} is longer than 1000000 bytes; cut"):
        preprocess_data.main([*command, "--overwrite"])
    assert preprocess_data.main([*command, "--overwrite", "--on-error", "skip"]) == 0
    assert len(IndexedDataset(str(tmp_path / "out_text_document"))) == 2


def test_a_tokenizer_that_changes_text_causes_a_warning(tmp_path, write_lines, capsys):
    tokenizer_flags = tokenizers.sentence_piece(tmp_path)
    source = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "two  spaces"}])
    assert preprocess_data.main(command_for(source, tmp_path / "out", tokenizer_flags)) == 0
    assert "warning" not in capsys.readouterr().err
    tokenizer_flags = tokenizers.lossy(tmp_path)
    assert preprocess_data.main(command_for(source, tmp_path / "lossy", tokenizer_flags)) == 0
    stderr = capsys.readouterr().err
    warning = "warning: the tokenizer changes text, ' spaces' comes back as 'spaces'"
    assert stderr.splitlines().count(warning) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partitions", "0"], "--partitions 0 is less than 1"),
        (["--workers", "0"], "--workers 0 is less than 1; give a positive number"),
        (["--log-interval", "-1"], "--log-interval -1 is less than 1"),
        (["--json-keys", "a", "a"], "--json-keys a a names a key twice; name each once"),
        (["--json-keys", "text", "a/b"], "--json-keys text a/b has a /, .*; rename the key"),
        (["--input", "no-such-file"], "no-such-file does not exist"),
        (["--output-prefix", "no-such-folder/x"], "no-such-folder, which is no folder; create"),
        (["--tokenizer-model", "./no-such-folder"], "no-such-folder does not exist"),
        (["--tokenizer-model", "/dev/null"], "cannot be loaded"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer .* cannot be loaded"),
        (["--engine", "gigatoken", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"],
         "--engine gigatoken cannot stand for the tokenizer: it needs a fast tokenizer"),
        (["--split-sentences", "--lang", "klingon"], "--lang klingon has no Punkt model"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(tmp_path, arguments, message, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}])
    valid_flags = command_for(source, tmp_path / "out", tokenizer_folder)
    with pytest.raises(ConfigError, match=message) as error:
        preprocess_data.main([*valid_flags, *arguments])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_an_unwritable_folder_is_reported_in_one_sentence(tmp_path, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}])
    (tmp_path / "out.partial").write_text("a file")
    with pytest.raises(ConfigError, match=r"out.partial cannot be written \(.*\); give another"):
        preprocess_data.main(command_for(source, tmp_path / "out", tokenizer_folder))


@pytest.mark.parametrize("records", [[], [{"text": ""}, {"text": ""}]])
def test_input_without_text_is_refused(tmp_path, records, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ConfigError, match=f"holds {len(records)} documents and no text under 'te"):
        preprocess_data.main(command_for(source, tmp_path / "out", tokenizer_folder))
    assert list(tmp_path.iterdir()) == [source]


def test_input_of_only_faulty_documents_is_refused(tmp_path, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"body": "a"}] * 3)
    sentence = r"no text under 'text', and all 3 were left out \(3 has no key 'text'\); give files"
    with pytest.raises(ConfigError, match=sentence):
        preprocess_data.main(
            command_for(source, tmp_path / "out", tokenizer_folder, "--on-error", "skip")
        )
    assert list(tmp_path.iterdir()) == [source]


def test_a_closed_standard_input_is_refused(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="--input - is standard input, which is closed; pipe"):
        preprocess_data.main(command_for("-", tmp_path / "out", tokenizer_folder))


def test_a_missing_tokenizer_is_refused(tmp_path, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="--tokenizer-type is not given"):
        preprocess_data.main(["--input", str(source), "--output-prefix", str(tmp_path / "out")])


def test_a_report_among_the_inputs_is_refused(tmp_path, tokenizer_folder, write_lines):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    command = command_for(
        tmp_path, tmp_path / "out", tokenizer_folder, "--on-error", "skip", "--overwrite"
    )
    assert preprocess_data.main(command) == 0
    assert (tmp_path / "out_errors.jsonl").read_bytes() == b""
    with pytest.raises(ConfigError, match=r"leads to .*out_errors.jsonl, the report of this very"):
        preprocess_data.main(command)


def test_the_sample_comes_from_several_files(tmp_path, tokenizer_folder, write_lines):
    for number in range(20):
        write_lines(tmp_path / f"{number:02}.jsonl", [{"text": f"file {number}"}])
    args = preprocess_data.build_parser().parse_args(
        command_for(tmp_path, tmp_path / "out", tokenizer_folder)
    )
    sample = preprocess.sample_texts(preprocess_data.describe(args), [])
    assert sample == [f"file {number}" for number in range(0, 20, 3)]
