"""The corpus is real text, has the same split on every machine, and is written atomically."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import corpus
from examples.quickstart.html_text import html_to_text
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT


def read_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """The real corpus, built by the command."""
    folder = tmp_path_factory.mktemp("corpus") / "new" / "stdlib"
    result = subprocess.run(
        [sys.executable, "-m", "examples.quickstart.corpus", "--output", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "documents" in result.stdout
    return corpus.build_corpus("stdlib", folder)


def test_the_stdlib_corpus_holds_every_document_once(stdlib):
    train, valid = read_lines(stdlib.train), read_lines(stdlib.valid)
    assert sorted(path.name for path in stdlib.train.parent.iterdir()) == [
        "corpus.json", "train.jsonl", "valid.jsonl",
    ]  # fmt: skip
    assert len(train) + len(valid) == stdlib.documents
    assert 0.02 < len(valid) / stdlib.documents < 0.08
    texts = [record["text"] for record in train + valid]
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    assert sum(len(text.encode()) for text in texts) == stdlib.bytes > 5e6
    sources = [record["source"] for record in train + valid]
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics/while"} <= set(sources)
    skipped = {"site-packages", "test", "tests", "__pycache__", "encodings"}
    assert not [source for source in sources if skipped & set(source.split("/"))]
    assert all(corpus.is_valid(record["source"]) for record in valid)
    assert not any(corpus.is_valid(record["source"]) for record in train)


def test_a_document_is_always_assigned_to_the_same_split():
    # This split must never change, so that every machine holds out the same documents.
    names = [f"folder/file{number}.py" for number in range(100)]
    assert [number for number, name in enumerate(names) if corpus.is_valid(name)] == [
        10,
        12,
        23,
        29,
        38,
        70,
        82,
        84,
    ]


def test_a_complete_corpus_is_reused_and_a_damaged_one_is_rebuilt(stdlib, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(stdlib.train.parent, folder)
    (folder / "mine").write_text("kept")
    stat_before = (folder / "train.jsonl").stat()
    assert corpus.build_corpus("stdlib", folder).documents == stdlib.documents
    assert (folder / "train.jsonl").stat().st_ino == stat_before.st_ino

    os.truncate(folder / "valid.jsonl", 10)
    rebuilt = corpus.build_corpus("stdlib", folder)
    assert (rebuilt.documents, rebuilt.bytes) == (stdlib.documents, stdlib.bytes)
    for name in ("train.jsonl", "valid.jsonl", "corpus.json"):
        assert (folder / name).read_bytes() == (stdlib.train.parent / name).read_bytes()
    assert (folder / "mine").read_text() == "kept"

    inode = (folder / "train.jsonl").stat().st_ino
    monkeypatch.setattr(corpus, "RECIPE", corpus.RECIPE + 1)
    corpus.build_corpus("stdlib", folder)
    assert (folder / "train.jsonl").stat().st_ino != inode


def test_a_failure_leaves_no_file(tmp_path):
    def documents():
        yield corpus.Document(source="a", text="x")
        raise ConfigError("stop")

    with pytest.raises(ConfigError, match="stop"):
        corpus._write(tmp_path / "new", {"kind": "k", "origin": []}, documents())
    with pytest.raises(ConfigError, match="0 documents to train on and 0 to validate on"):
        corpus._write(tmp_path / "new", {"kind": "k", "origin": []}, [])
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'web' is unknown; choose one of: stdlib, debian-docs"):
        corpus.build_corpus("web", tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_a_debian_package_gives_the_text_of_its_pages(tmp_path):
    pages = tmp_path / "root" / "usr" / "share" / "doc" / "some-doc"
    pages.mkdir(parents=True)
    for number in range(60):
        (pages / f"page{number}.html").write_text(
            f"<title>t</title><p>page {number} &amp; more</p>"
        )
    (pages / "copy.html").write_text("<p>page 1 &amp; more</p>")
    (pages / "genindex-all.html").write_text("<p>links</p>")
    control = tmp_path / "root" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: some-doc\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    )
    cache = tmp_path / "corpus" / "packages"
    cache.mkdir(parents=True)
    subprocess.run(
        ["dpkg-deb", "-b", tmp_path / "root", cache / "some-doc_1_all.deb"],
        check=True,
        capture_output=True,
    )
    built_corpus = corpus.build_corpus("debian-docs", tmp_path / "corpus", packages=["some-doc"])
    records = read_lines(built_corpus.train) + read_lines(built_corpus.valid)
    assert sorted(record["text"] for record in records) == sorted(
        f"page {number} & more\n" for number in range(60)
    )
    assert records[0]["source"].startswith("some-doc/usr/share/doc/")


def test_the_sources_of_debian_pages_replace_the_pages(tmp_path):
    (tmp_path / "page.html").write_text("<p>page</p>")
    (tmp_path / "page.rst.txt").write_text("page *source*")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    texts = [document.text for document in corpus._package_documents("some-doc", tmp_path)]
    assert texts == ["page *source*"]


@pytest.mark.parametrize(
    ("script", "packages", "message"),
    [
        (None, ["some-doc"], "needs apt-get, which this machine does not have"),
        ("echo 'W: slow' >&2; echo 'E: no network' >&2; exit 100", ["some-doc"],
         r"some-doc cannot be downloaded \(no network\); run `apt-get update`"),
        ("exit 0", ["--config=x"], "is not a name of a Debian package"),
    ],
)  # fmt: skip
def test_debian_failures_are_reported(tmp_path, monkeypatch, script, packages, message):
    tools = tmp_path / "bin"
    tools.mkdir()
    if script is not None:
        (tools / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ConfigError, match=message):
        corpus.build_corpus("debian-docs", tmp_path / "new", packages=packages)
    assert list(tmp_path.iterdir()) == [tools]


def test_html_becomes_plain_text():
    html = """<html><head><title>no</title><style>p {}</style></head><body>
    <div class="related navigation">no <br> no</div>
    <h1>Title<a class="headerlink" href="#t">¶</a></h1>
    <p>Some   <b>bold</b>
    text &lt;here&gt;.
    <ul><li>one<li>two</ul>
    <pre>  kept
      as  is</pre>
    <table><tr><td>a</td><td>b</td></tr></table>
    <nav><ul><li>no</ul></nav></div>end</body></html>"""
    assert html_to_text(html) == (
        "Title\nSome bold text <here>.\none\ntwo\n  kept\n      as  is\na b\nend\n"
    )
