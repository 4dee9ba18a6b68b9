"""Every kind of corpus becomes data sets that Megatron can read."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from examples.data import published
from examples.data.__main__ import main
from examples.data.files import folder_documents
from examples.quickstart import data
from megatron_sffn.checks.data import check_dataset
from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

# Other tests may have left threads running; the workers of these tests do not use them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tools in this process, because a new process needs seconds for imports."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run_tool(name: str, *arguments: str) -> None:
        assert importlib.import_module(name).main(arguments) == 0

    monkeypatch.setattr(data, "run_tool", run_tool)


def check_parts(output: Path, vocab_size: int, key: str = "text") -> dict[str, int]:
    """Check that Megatron can read all parts; returns their numbers of documents."""
    for part in published.PARTS:
        check_dataset(f"{output}/{part}_{key}_document", vocab_size)
    assert not output.with_name(f"{output.name}.partial").exists()
    return {
        part: open_index(f"{output}/{part}_{key}_document").num_documents
        for part in published.PARTS
    }


PART_FLAGS = ("--parts", "train=0.6,valid=0.2,test=0.2", "--vocab-size", "300")


def test_a_folder_of_files_becomes_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notes"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for number in range(40):
        (folder / "deep" / f"{number}.md").write_text(f"# Note {number}\n\nIts text: {number}\n")
    (folder / "copy.md").write_text("# Note 1\n\nIts text: 1\n")
    (folder / "page.html").write_text("<title>no</title><p>page &amp; more</p>")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\0")
    (folder / "nul.bin").write_bytes(b"a\0b")
    (folder / "empty").touch()
    (folder / "deep" / ".hidden" / "x.md").write_text("hidden")
    sources = {document.source: document.text for document in folder_documents(folder, ())}
    assert len(sources) == 44 and sources["deep/3.md"] == "# Note 3\n\nIts text: 3\n"
    assert (sources["page.html"], sources["bom.txt"]) == ("page & more\n", "marked")
    assert {document.source for document in folder_documents(folder, [".md"])} == {
        name for name in sources if name.endswith(".md")
    }

    output = tmp_path / "out"
    assert main(["folder", str(folder), "--output", str(output), *PART_FLAGS]) == 0
    documents = check_parts(output, 300)
    assert sum(documents.values()) == 42  # without the copy and the empty file
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["tokenizer"]
        + [
            name
            for part in published.PARTS
            for name in (f"{part}.jsonl", f"{part}_text_document.bin", f"{part}_text_document.idx")
        ]
    )
    stdout = capsys.readouterr().out
    assert f"--valid-data-path {output}/valid_text_document" in stdout
    assert f"--tokenizer-model {output}/tokenizer" in stdout

    # A second data set can use the tokenizer of the first one.
    flags = ["--tokenizer", str(output / "tokenizer"), "--output", str(tmp_path / "again")]
    assert main(["folder", str(folder), *flags, *PART_FLAGS]) == 0
    assert check_parts(tmp_path / "again", 300) == documents
    assert not (tmp_path / "again" / "tokenizer").exists()


def test_parquet_files_become_a_data_set(tmp_path: Path) -> None:
    for number in range(2):
        rows = {"content": [f"row {number} {row}" for row in range(30)], "id": list(range(30))}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{number}.parquet")
    flags = ["--json-key", "content", "--output", str(tmp_path / "out"), *PART_FLAGS]
    assert main(["parquet", f"{tmp_path}/*.parquet", *flags]) == 0
    assert sum(check_parts(tmp_path / "out", 300, "content").values()) == 60


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_debian_docs_become_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = tmp_path / "root" / "usr" / "share" / "doc" / "some-doc"
    pages.mkdir(parents=True)
    for number in range(40):
        (pages / f"page{number}.html").write_text(f"<p>page {number} of some length</p>")
    (tmp_path / "root" / "DEBIAN").mkdir()
    (tmp_path / "root" / "DEBIAN" / "control").write_text(
        "Package: some-doc\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    )
    archive = tmp_path / "some-doc_1_all.deb"
    command = ["dpkg-deb", "-b", str(tmp_path / "root"), str(archive)]
    subprocess.run(command, check=True, capture_output=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(f"#!/bin/sh\ncp {archive} .\n")
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    flags = ["--packages", "some-doc", "--output", str(tmp_path / "out"), *PART_FLAGS]
    assert main(["debian-docs", *flags]) == 0
    assert sum(check_parts(tmp_path / "out", 300).values()) == 40


# --- WikiText-103

ARTICLE = " \n = {} = \n \n Words of <unk> . \n \n = = A section = = \n \n 1 = 1 = 1 \n = x = \n"
WIKI = {
    "wiki.train.tokens": "".join(ARTICLE.format(f"Title {n}") for n in range(30)) + " \n",
    "wiki.valid.tokens": ARTICLE.format("Grüße") + ARTICLE.format("= odd"),
    "wiki.test.tokens": ARTICLE.format("A = b"),
}


@pytest.fixture
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with small files that replace the published ones."""
    folder = tmp_path / "wikitext-103"
    folder.mkdir()
    for name, text in WIKI.items():
        (folder / name).write_text(text, encoding="utf-8")
    digests = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in WIKI.items()}
    monkeypatch.setattr(
        published, "WIKITEXT_103", {"tokens": digests, "raw": published.WIKITEXT_103["raw"]}
    )
    yield folder


def zip_folder(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"{folder.name}/{file.name}")
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_wikitext_keeps_its_published_parts(tmp_path: Path, wikitext: Path, zipped: bool) -> None:
    path = zip_folder(wikitext) if zipped else wikitext
    flags = ["--output", str(tmp_path / "out"), "--vocab-size", "300"]
    assert main(["wikitext-103", str(path), *flags]) == 0
    # A title that begins or ends with = is the title of a section.
    assert check_parts(tmp_path / "out", 300) == {"train": 30, "valid": 1, "test": 1}
    parts = json.loads((tmp_path / "out" / "parts.json").read_text())
    for part, text in zip(published.PARTS, WIKI.values(), strict=True):
        lines = (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()
        assert "".join(json.loads(line)["text"] for line in lines) == text
        words = sum(len(line.split()) + 1 for line in text.splitlines())
        assert parts[part] == {"documents": len(lines), "words": words}


def test_articles_begin_with_their_titles(wikitext: Path) -> None:
    articles = list(published.articles(wikitext / "wiki.train.tokens"))
    assert [text.splitlines()[1] for text in articles] == [
        f" = Title {number} = " for number in range(30)
    ]


# --- enwik8

ENWIK8_BYTES = bytes(range(256)) * 4


@pytest.fixture
def enwik8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that replaces the published one."""
    path = tmp_path / "given" / "enwik8"
    path.parent.mkdir()
    path.write_bytes(ENWIK8_BYTES)
    published_file = published.Enwik8(
        sha1=hashlib.sha1(ENWIK8_BYTES).hexdigest(), sizes=(900, 100, 24)
    )
    monkeypatch.setattr(published, "ENWIK8", published_file)
    return path


@pytest.mark.parametrize("kind", ["file", "folder", "archive"])
def test_enwik8_keeps_its_published_parts(tmp_path: Path, enwik8: Path, kind: str) -> None:
    path = {"file": enwik8, "folder": enwik8.parent, "archive": enwik8.with_suffix(".zip")}[kind]
    if kind == "archive":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(enwik8, "enwik8")
    output = tmp_path / "data" / "out"
    assert main(["enwik8", str(path), "--output", str(output)]) == 0
    assert check_parts(output, 258) == {"train": 1, "valid": 1, "test": 1}
    parts = [
        numpy.fromfile(output / f"{part}_text_document.bin", numpy.uint16)
        for part in published.PARTS
    ]
    assert [len(part) for part in parts] == [900, 100, 24]
    assert numpy.concatenate(parts).astype(numpy.uint8).tobytes() == ENWIK8_BYTES


def test_the_published_sizes_and_digests_are_consistent() -> None:
    assert sum(published.ENWIK8.sizes) == 10**8
    digests = [published.ENWIK8.sha1] + [
        sha1 for files in published.WIKITEXT_103.values() for sha1 in files.values()
    ]
    assert len(set(digests)) == 7 and all(len(bytes.fromhex(sha1)) == 20 for sha1 in digests)


# --- Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("folder nowhere", "nowhere is no folder; give a folder of files"),
        ("folder nothing", "no file with text was found; give another folder"),
        ("folder notes --suffixes .rst", "no file with text was found"),
        ("folder notes --parts a=1", "has no two different names"),
        ("folder notes --output notes", "--output notes is there already; give another"),
        ("folder notes --parts train=1,valid=1", "does not name train, valid, test, each once"),
        ("folder notes --output notes/a/b", r"--output notes/a/b cannot be made \(Not a directory"),
        ("parquet notes/*.parquet", r"--input notes/\*\.parquet does not exist"),
        ("wikitext-103 nowhere", "nowhere does not exist; give the archive"),
        ("wikitext-103 notes", r"notes has no wiki\.train\.tokens and no wiki\.train\.raw; give"),
        ("wikitext-103 wiki", r"wiki\.train\.raw of wiki has the SHA-1 .*, but the published file"),
        ("enwik8 nowhere", "nowhere does not exist"),
        ("enwik8 notes", "notes holds no file enwik8; give enwik8.zip, or the file itself"),
        ("enwik8 notes/a", "a of notes/a has the SHA-1 .*, but the published file has 57b8363b"),
        ("enwik8 other.zip", r"other\.zip holds no file enwik8"),
        ("enwik8 damaged.zip", r"damaged\.zip is damaged .*; download it again"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("notes", "nothing", "wiki"):
        Path(folder).mkdir()
    Path("notes/a").write_text("text")
    for part in published.PARTS:
        Path(f"wiki/wiki.{part}.raw").write_text("other")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("x", "y")
    with zipfile.ZipFile("damaged.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("enwik8", "content" * 99)
    content = Path("damaged.zip").read_bytes()
    Path("damaged.zip").write_bytes(content.replace(b"content", b"another", 1))
    files_before = sorted(tmp_path.rglob("*"))
    command = arguments.split()
    with pytest.raises(ConfigError, match=message) as error:
        main(command if "--output" in command else [*command, "--output", "out"])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files_before


def test_a_failing_tool_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, *arguments: str) -> None:
        raise data.ToolFailedError(f"tools/{name}.py ended with exit code 2")

    monkeypatch.setattr(data, "run_tool", fail)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").write_text("text")
    assert main(["folder", str(tmp_path / "notes"), "--output", str(tmp_path / "out")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_the_command_prints_its_help() -> None:
    """Only the help runs in a new process; tests/tools tests the tools as processes."""
    command = [sys.executable, "-m", "examples.data", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "wikitext-103" in result.stdout and "enwik8 enwik8.zip" in result.stdout
