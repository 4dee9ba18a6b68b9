"""The dataset: every id is the tokenizer's, order is the input's, and a stop leaves nothing."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import preprocess_data
import pytest

from megatron_sffn.data.jsonl import Line
from megatron_sffn.errors import ConfigError

# Other tests may have left threads in this process; the workers of these use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def flags(source: Path, prefix: Path, tokenizer: Path, *more: object) -> list[str]:
    values = ["--input", source, "--output-prefix", prefix, "--append-eod"]
    values += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    return [str(value) for value in [*values, *more]]


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}_*")
    }


@pytest.fixture
def tokenizer(build_tokenizer, tokenizer_folder):
    return build_tokenizer(tokenizer_folder)


@pytest.fixture
def documents(texts):
    """More than one batch per worker, of very different lengths, with an empty document."""
    rng = random.Random(0)
    made = [" ".join(rng.choices(texts, k=rng.choice([1, 5, 300]))) for _ in range(700)]
    return [*made[:10], "", *made[10:]]


def test_ids_order_and_workers(
    tmp_path, documents, tokenizer, tokenizer_folder, write_lines, start_tool
):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    records = [{"text": text, "title": text[:9] + str(i)} for i, text in enumerate(documents)]
    source = write_lines(tmp_path / "a.jsonl", records)
    assert source.stat().st_size > 4 * preprocess_data.BATCH_BYTES
    more = ["--json-keys", "text", "title", "--log-interval", 100, "--keep-newlines"]

    process = start_tool(
        "preprocess_data.py", *flags(source, tmp_path / "two", tokenizer_folder, *more),
        "--workers", 2,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"two_text_document: {len(documents)} documents" in out
    assert "MB/s" in err and "M tokens, ETA 0:00:" in err
    assert "Transformer Engine" not in err

    one = flags(source, tmp_path / "one", tokenizer_folder, *more, "--workers", 1)
    assert preprocess_data.main(one) == 0
    assert files_of(tmp_path, "one") == files_of(tmp_path, "two")
    assert sorted(files_of(tmp_path, "one")) == [
        f"_{key}_document.{end}" for key in ("text", "title") for end in ("bin", "idx")
    ]

    for key in ("text", "title"):
        dataset = IndexedDataset(str(tmp_path / f"one_{key}_document"))
        assert dataset.index.dtype == np.uint16
        expected = [tokenizer.tokenize(record[key]) for record in records]
        kept = [ids for ids in expected if ids]
        assert len(dataset) == len(kept)
        for ids, stored in zip(kept, dataset, strict=True):
            assert stored.tolist() == [*ids, tokenizer.eod]
        # A document per line; the empty one has no sequence.
        counts = np.diff(dataset.document_indices)
        assert counts.tolist() == [1 if ids else 0 for ids in expected]


def test_kill_leaves_no_dataset(tmp_path, tokenizer_folder, write_lines, start_tool):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    process = start_tool(
        "preprocess_data.py", *flags(pipe, tmp_path / "out", tokenizer_folder, "--workers", 2)
    )
    # Writes of up to this length go into the pipe whole or not at all.
    length = os.pathconf(pipe, "PC_PIPE_BUF") - 20
    line = json.dumps({"text": "x " * (length // 2)}).encode() + b"\n"
    deadline = time.monotonic() + 60
    with pipe.open("wb", buffering=0) as writer:
        os.set_blocking(writer.fileno(), False)
        started = False
        # Feed it until it has written ids, kill the main process, and go on until the pipe has
        # no reader: the workers hold it open, so they must have ended too.
        try:
            while time.monotonic() < deadline:
                if not writer.write(line):
                    time.sleep(0.01)
                ids = list(tmp_path.glob("out_text_document.bin.*.partial"))
                if not started and ids and ids[0].stat().st_size:
                    started = True
                    process.kill()
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"still running after a minute, started={started}")
        except BrokenPipeError:
            assert started, process.communicate()
    assert process.wait(timeout=10) == -signal.SIGKILL
    process.communicate()
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    assert list(tmp_path.glob("*.partial"))

    source = write_lines(tmp_path / "a.jsonl", [{"text": "again"}])
    assert preprocess_data.main(flags(source, tmp_path / "out", tokenizer_folder)) == 0
    assert sorted(files_of(tmp_path, "out")) == ["_text_document.bin", "_text_document.idx"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x"', r"line 3 of .*a\.jsonl is not JSON"),
        (b"", "line 3 .* is not JSON"),
        (b'{"text": "\xff"}', "line 3 .* is not JSON .*UTF-8"),
        (b'["x"]', "line 3 .* is a JSON list, not an object"),
        (b'{"body": "x"}', r"line 3 .* has no key 'text' \(it has body\)"),
        (b'{"text": 5}', "line 3 .* holds int under 'text'"),
        (b'{"text": ["x"]}', "line 3 .* holds list"),
        (b'{"text": "\\ud83d"}', "line 3 .* surrogate"),
    ],
)
@pytest.mark.usefixtures("tokenizer")
def test_bad_line(tmp_path, bad, message, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, bad, {"text": "c"}])
    arguments = flags(source, tmp_path / "out", tokenizer_folder, "--workers", 1)
    with pytest.raises(ConfigError, match=message):
        preprocess_data.main(arguments)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split-sentences"], "--split-sentences is not available"),
        (["--partitions", "2"], "--partitions 2 is not available"),
        (["--workers", "0"], "--workers 0 is less than 1"),
        (["--json-keys", "a", "a"], "names a key twice"),
        (["--json-keys", "text", "a/b"], "out_a/b_document.bin cannot be written"),
        (["--input", "no-such-file"], "no-such-file does not exist"),
        (["--output-prefix", "no-such-folder/x"], "no-such-folder, which is no folder"),
        (["--tokenizer-model", "./no-such-folder"], "no-such-folder does not exist"),
        (["--tokenizer-model", "/dev/null"], "cannot be loaded"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer .* cannot be loaded"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"], "cannot encode line 1 .*one"),
    ],
)
@pytest.mark.usefixtures("tokenizer")
def test_bad_arguments(tmp_path, arguments, message, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}])
    base = flags(source, tmp_path / "out", tokenizer_folder, "--workers", 1)
    with pytest.raises(ConfigError, match=message):
        preprocess_data.main([*base, *arguments])
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("tokenizer")
def test_ids_outside_the_vocabulary(tmp_path, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1 2"}, {"text": "3 70000"}])
    arguments = ["--input", str(source), "--output-prefix", str(tmp_path / "out")]
    arguments += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--workers", "1"]
    with pytest.raises(
        ConfigError, match=r"line 2 .* ids 3 to 70000, outside its vocabulary of 100"
    ):
        preprocess_data.main(arguments)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("records", [[], [{"text": ""}, {"text": ""}]])
@pytest.mark.usefixtures("tokenizer")
def test_no_text(tmp_path, records, tokenizer_folder, write_lines):
    source = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ConfigError, match=f"holds {len(records)} documents and no text"):
        preprocess_data.main(flags(source, tmp_path / "out", tokenizer_folder, "--workers", 1))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("tokenizer")
def test_no_tokenizer(tmp_path, write_lines):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="--tokenizer-type is not given"):
        preprocess_data.main(["--input", str(source), "--output-prefix", str(tmp_path / "out")])


def batches_of(count: int, taken: list[int]):
    for number in range(1, count + 1):
        taken.append(number)
        yield [Line(path="a", number=number, content=b"x")]


def encode_number(batch):
    """Stands in for an encoder: odd lines take longer, and 13 kills its worker."""
    number = batch[0].number
    time.sleep(0.02 if number % 2 else 0)
    if number == 13:
        os._exit(1)
    return preprocess_data.EncodedBatch(documents=[[np.array([number])]], num_bytes=1)


def test_workers_keep_order_and_read_no_further():
    taken: list[int] = []
    encoded = preprocess_data.encode_in_order(encode_number, batches_of(12, taken), workers=2)
    numbers = [next(encoded).documents[0][0].item()]
    assert len(taken) == 2 * preprocess_data.BATCHES_PER_WORKER
    numbers += [batch.documents[0][0].item() for batch in encoded]
    assert numbers == list(range(1, 13))


def test_bad_line_in_a_worker():
    def encode(batch):
        raise ConfigError(f"{batch[0]} is bad")

    encoded = preprocess_data.encode_in_order(encode, batches_of(9, []), workers=2)
    with pytest.raises(ConfigError, match="line 1 of a is bad"):
        list(encoded)


def test_killed_worker():
    encoded = preprocess_data.encode_in_order(encode_number, batches_of(13, []), workers=2)
    with pytest.raises(ConfigError, match="--workers 2 processes was killed"):
        list(encoded)
