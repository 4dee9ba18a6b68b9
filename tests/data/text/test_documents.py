"""Documents give their texts, and a faulty document is reported in one sentence."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_sffn.data.text.chunks import read_chunks
from megatron_sffn.data.text.documents import Document, DocumentError, documents_of, read_documents
from megatron_sffn.data.text.sources import find_sources


def line_document(content: bytes) -> Document:
    return Document(path="a.jsonl", unit="line", number=3, content=content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"text": "a"}', "a"),
        (b'{"text": ""}', ""),
        (b'  {"other": [1], "text": "a\\u0000\\n\xc3\xa9 \\ud83e\\udd99"}\r', "a\0\né 🦙"),
        # Megatron-LM's `json` accepts these, and orjson does not.
        (b'{"text": "a", "score": NaN, "big": 1e999}', "a"),
        (b'{"text": "a", "note": "\\ud83d"}', "a"),
        (b'{"text": "a", "id": 123456789012345678901234567890}', "a"),
        (b'{"text": "a", "text": "b"}', "b"),
    ],
)
def test_lines_are_documents(content: bytes, text: str) -> None:
    assert line_document(content).texts(["text"]) == [text]
    assert line_document(content).sequences(["text"]) == [[text]]
    assert line_document(content).record()["text"] == text


def test_several_keys_and_lists_are_read() -> None:
    document = line_document(b'{"b": "two", "a": ["one", "", "more"], "c": []}')
    assert document.sequences(["a", "b", "c"]) == [["one", "", "more"], ["two"], []]
    assert document.texts(["b"]) == ["two"]
    with pytest.raises(DocumentError, match="holds list under 'a', not a string"):
        document.texts(["b", "a"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "x"', r"is not JSON \(.* at character 12\); correct or remove it"),
        (b"plain text", r"is not JSON \(Expecting value at character 0\)"),
        (b'{"text": "\xff"}', r"is not JSON \(it is not UTF-8 at byte 10\)"),
        (b'{"text": "a\x00b"}', r"is not JSON \(it holds a NUL at byte 11\)"),
        (b"\x00\x00\x00", r"is not JSON \(it holds a NUL at byte 0, as UTF-16 text does\)"),
        (b"{", r"is the beginning of JSON over several lines; write one object on a line: jq -c"),
        (b" [ \r", r"is the beginning of JSON over several lines"),
        (b"[" * 100_000, r"is not JSON \(it is nested too deeply\)"),
        (b'["x"]', r'is a JSON list, not an object; write \{"text": "..."\} on every line'),
        (b'"x"', "is a JSON str, not an object"),
        (b'{"body": "x", "a": 1}', r"has no key 'text' \(it has a, body\); name an existing key"),
        (b"{}", r"has no key 'text' \(it has no keys\)"),
        (b'{"text": 5}', "holds int under 'text', not a string; store the text"),
        (b'{"text": null}', "holds null under 'text'"),
        (b'{"text": {"a": "b"}}', "holds dict under 'text'"),
        (b'{"text": ["a", 5]}', "holds int under 'text'"),
        (b'{"text": "a \\ud83d b"}', r"holds half of a surrogate pair \('\\ud83d'\) under 'text'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_faulty_lines_are_reported_in_one_sentence(content: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=rf"^line 3 of a\.jsonl {reason}") as error:
        line_document(content).sequences(["text"])
    assert "\n" not in str(error.value)
    fault = error.value.fault
    assert (fault.path, fault.number) == ("a.jsonl", 3)
    assert str(error.value) == f"line 3 of a.jsonl {fault.reason}; {fault.remedy}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\xff", r"is not UTF-8 \(invalid start byte at byte 1\); convert it to UTF-8"),
        ("a".encode("utf-16"), "is UTF-16 by its first bytes; convert it"),
        ("a".encode("utf-16-le"), "holds a NUL at byte 1, which no text has"),
    ],
)
def test_faulty_texts_are_reported_in_one_sentence(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=f"^{path} {reason}"):
        for document in read_documents(find_sources([str(path)], ["text"])):
            document.texts(["text"])


def test_a_text_file_has_its_text_under_any_key(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo")
    (document,) = read_documents(find_sources([str(path)], ["body"]))
    assert document.texts(["body"]) == ["one\ntwo"]
    assert document.record() == {"text": "one\ntwo"}
    assert str(document) == str(path)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()]
)
def test_rows_are_documents(tmp_path: Path, kind: pyarrow.DataType) -> None:
    path = tmp_path / "a.parquet"
    values = ["é", "", None] if "binary" not in str(kind) else ["é".encode(), b"", None, b"\xff"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind), "n": values}), path)
    documents = list(read_documents(find_sources([str(path)], ["text"]), columns=["text"]))
    assert [document.texts(["text"]) for document in documents[:2]] == [["é"], [""]]
    assert [str(document) for document in documents[:2]] == [
        f"row {number} of {path}" for number in (1, 2)
    ]
    assert documents[0].record().keys() == {"text"}
    with pytest.raises(DocumentError, match=f"row 3 of {path} holds null under 'text'"):
        documents[2].texts(["text"])
    for document in documents[3:]:
        with pytest.raises(DocumentError, match=f"row 4 of {path} is not UTF-8"):
            document.texts(["text"])
    (first, *_) = read_documents(find_sources([str(path)], ["text"]))
    assert first.record().keys() == {"text", "n"}


def test_a_row_that_is_not_unicode_is_reported_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets = pyarrow.array([b"ok", b"caf\xe9", b"e\0nd"]).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, offsets)
    parquet.write_table(pyarrow.table({"text": column}), path)
    first, second, third = read_documents(find_sources([str(path)], ["text"]))
    assert first.texts(["text"]) + third.texts(["text"]) == ["ok", "e\0nd"]
    for read_row in (lambda: second.texts(["text"]), second.record):
        with pytest.raises(
            DocumentError, match=rf"row 2 of {path} is not UTF-8 \(.* at byte 3\); convert it"
        ):
            read_row()


def test_a_first_line_of_plain_text_suggests_another_file_ending() -> None:
    document = Document(path="a", unit="line", number=1, content=b"plain")
    with pytest.raises(DocumentError, match=r"; a file that is one text has a name .* in \.txt"):
        document.record()


def test_rows_of_lists_and_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [["a", "b"], []], "n": [1, 2]}), path)
    first, second = read_documents(find_sources([str(path)], ["text", "n"]))
    assert first.sequences(["text"]) == [["a", "b"]]
    assert second.sequences(["text"]) == [[]]
    with pytest.raises(DocumentError, match=f"row 1 of {path} holds int under 'n'"):
        first.sequences(["n"])


def test_a_truncated_file_ends_the_stream_with_an_error(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    documents = read_documents(find_sources([str(path)], ["text"]))
    assert [next(documents).number for _ in range(9)] == list(range(1, 10))
    with pytest.raises(DocumentError, match=f"^{path} is truncated or damaged after line 9 "):
        next(documents)


def test_documents_after_a_faulty_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n{"text": "b"}\n')
    (chunk,) = read_chunks(find_sources([str(path)], ["text"]))
    first, _, third = documents_of(chunk)
    assert first.texts(["text"]) + third.texts(["text"]) == ["a", "b"]
