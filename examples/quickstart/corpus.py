"""Builds a corpus of real text, without a network if possible.

Inputs: the kind of text. Outputs: `train.jsonl` and `valid.jsonl` with a document per line,
`{"text": ..., "source": ...}`, and `corpus.json`, which is written last and records the source.

Design notes:
- `stdlib` is the source text of the running Python's standard library, which every machine has;
  `debian-docs` is prose from documentation packages, for larger runs.
- Only the name of a document determines its split, so that it is the same on every machine and in
  every version.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.html_text import html_to_text
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command

KINDS = ("stdlib", "debian-docs")
DEBIAN_PACKAGES = ("python3.11-doc", "linux-doc-6.1", "postgresql-doc-15")
VALID_PERCENT = 5
# Increase this number if a change gives other text for the same source: corpora are then rebuilt.
RECIPE = 1


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and the name of its source, with `/` between folders."""

    source: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files of a corpus, its number of documents, and its bytes of text."""

    train: Path
    valid: Path
    documents: int
    bytes: int


def build_corpus(kind: str, folder: Path, *, packages: Sequence[str] = DEBIAN_PACKAGES) -> Corpus:
    """Build a corpus in `folder`, or return the complete one in it.

    Args:
        kind: `stdlib` or `debian-docs`.
        folder: created if missing; other files in it stay as they are.
        packages: for `debian-docs`, the packages to read; they are kept in `folder/packages`.

    Returns:
        Paths and sizes of a complete corpus.

    Raises:
        ConfigError: the kind is unknown, or its text is not available on this machine.
    """
    if kind not in KINDS:
        raise ConfigError(f"corpus kind {kind!r} is unknown; choose one of: {', '.join(KINDS)}")
    origin = [platform.python_version()] if kind == "stdlib" else list(packages)
    parameters = {"kind": kind, "origin": origin, "recipe": RECIPE}
    if corpus := _find(folder, parameters):
        log(f"corpus {folder}: reused, {corpus.documents} documents")
        return corpus
    if kind == "stdlib":
        return _write(folder, parameters, stdlib_documents(Path(os.__file__).parent))
    return _write(folder, parameters, debian_documents(folder / "packages", packages))


def is_valid(source: str) -> bool:
    """True if a document is held out for validation: about 5 of 100 are."""
    return int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100 < VALID_PERCENT


def log(message: str) -> None:
    """Print a line of progress."""
    print(message, file=sys.stderr, flush=True)


# --- files of a corpus


def _find(folder: Path, parameters: dict[str, object]) -> Corpus | None:
    try:
        manifest = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        is_current = manifest["parameters"] == parameters and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return _corpus(folder, manifest["documents"], manifest["bytes"]) if is_current else None


def _corpus(folder: Path, documents: int, num_bytes: int) -> Corpus:
    return Corpus(
        train=folder / "train.jsonl",
        valid=folder / "valid.jsonl",
        documents=documents,
        bytes=num_bytes,
    )


def _write(folder: Path, parameters: dict[str, object], documents: Iterable[Document]) -> Corpus:
    """Write the files atomically: remove the old manifest first, write the new one last."""
    names = ("train.jsonl", "valid.jsonl", "corpus.json")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in names}
    try:
        counts, num_bytes = _write_documents(
            documents, partial["train.jsonl"], partial["valid.jsonl"]
        )
        if not all(counts.values()):
            raise ConfigError(
                f"corpus {parameters['kind']} of {parameters['origin']} has {counts[False]} "
                f"documents to train on and {counts[True]} to validate on; choose another source"
            )
        manifest = {
            "parameters": parameters,
            "documents": sum(counts.values()),
            "bytes": num_bytes,
            "files": {name: partial[name].stat().st_size for name in names[:2]},
        }
        partial["corpus.json"].write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (folder / "corpus.json").unlink(missing_ok=True)
        for name in names:
            partial[name].replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    log(f"corpus {folder}: {manifest['documents']} documents, {num_bytes / 1e6:.1f} MB")
    return _corpus(folder, sum(counts.values()), num_bytes)


def _write_documents(
    documents: Iterable[Document], train: Path, valid: Path
) -> tuple[dict[bool, int], int]:
    """Write both splits; returns the number of documents by `is_valid`, and the bytes of text."""
    counts = {False: 0, True: 0}
    num_bytes = 0
    digests: set[bytes] = set()
    with (
        train.open("w", encoding="utf-8") as train_file,
        valid.open("w", encoding="utf-8") as valid_file,
    ):
        for document in documents:
            content = document.text.encode()
            digest = hashlib.sha256(content).digest()
            if not content.strip() or digest in digests:
                continue
            digests.add(digest)
            held_out = is_valid(document.source)
            record = {"text": document.text, "source": document.source}
            (valid_file if held_out else train_file).write(
                json.dumps(record, ensure_ascii=False) + "\n"
            )
            counts[held_out] += 1
            num_bytes += len(content)
            if len(digests) % 1000 == 0:
                log(f"wrote {len(digests)} documents, {num_bytes / 1e6:.1f} MB")
    return counts, num_bytes


# --- the standard library

# Installed packages; tests, which have twice as much text as all other folders and are absent on
# some systems; tables of numbers.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
}


def stdlib_documents(root: Path) -> Iterator[Document]:
    """Source files below `root` and the topics of the language reference, sorted by name."""
    for path in sorted(_stdlib_files(root), key=lambda path: path.as_posix()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(source=path.relative_to(root).as_posix(), text=text)
    yield from _topics()


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        # Folders config-* hold settings of the build, with paths of the machine that built it.
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        for name in files:
            # `_topics` reads topics.py; _sysconfigdata holds settings of the build, too.
            if name.endswith((".py", ".txt", ".rst")) and not name.startswith(
                ("_sysconfigdata", "topics.py")
            ):
                yield Path(folder, name)


def _topics() -> Iterator[Document]:
    """The chapters that `help("TOPIC")` prints: prose, which pydoc stores as string literals."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # absent on some systems
        return
    for name in sorted(topics):
        yield Document(source=f"pydoc_data/topics/{name}", text=topics[name])


# --- Debian's documentation packages

SOURCE_SUFFIXES = (".rst", ".txt", ".rst.gz", ".txt.gz")
PAGE_SUFFIXES = (".html", ".html.gz")
# These pages are lists of links without text.
SKIPPED_PAGES = re.compile(r"(genindex|bookindex|py-modindex|search|changelog|copyright)[-.\w]*")


def debian_documents(cache: Path, packages: Sequence[str]) -> Iterator[Document]:
    """Texts of documentation packages; packages that `cache` lacks are downloaded into it."""
    for package in packages:
        archive = _download(package, cache)
        with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
            _run(["dpkg", "-x", str(archive), folder], f"{archive} cannot be unpacked", "delete it")
            yield from _package_documents(package, Path(folder))


def _download(package: str, cache: Path) -> Path:
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
        raise ConfigError(f"{package!r} is not a name of a Debian package; correct it")
    if archives := sorted(cache.glob(f"{package}_*.deb")):
        return archives[-1]
    log(f"downloading {package}")
    is_new = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(".partial-*"):
        shutil.rmtree(stale)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
            _run(
                ["apt-get", "download", package],
                f"package {package} cannot be downloaded",
                "run `apt-get update` as root, name packages that this release has, or use the "
                "corpus stdlib",
                folder=folder,
            )
            (archive,) = Path(folder).glob("*.deb")
            return archive.replace(cache / archive.name)
    finally:
        if is_new and not any(cache.iterdir()):
            cache.rmdir()


def _run(command: list[str], failure: str, remedy: str, folder: str | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"corpus debian-docs needs {command[0]}, which this machine does not have; "
            "use the corpus stdlib"
        )
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith("W:")]
        reason = lines[0].removeprefix("E: ") if lines else f"exit code {result.returncode}"
        raise ConfigError(f"{failure} ({reason}); {remedy}")


def _package_documents(package: str, root: Path) -> Iterator[Document]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if not SKIPPED_PAGES.fullmatch(path.name)]
    sources = [path for path in files if path.name.endswith(SOURCE_SUFFIXES)]
    # If a package has the sources of its pages, the pages would repeat their text.
    paths = sources or [path for path in files if path.name.endswith(PAGE_SUFFIXES)]
    log(f"reading {package}: {len(paths)} files")
    for path in paths:
        content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if path.name.endswith(PAGE_SUFFIXES):
            text = html_to_text(text)
        yield Document(source=f"{package}/{path.relative_to(root).as_posix()}", text=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Build a corpus with the arguments of the command line."""
    parser = CommandParser(description="Build a corpus of real text, as JSON lines.")
    parser.add_argument("--kind", default="stdlib", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("--output", type=Path, default=Path("corpus"), help="folder of the corpus")
    parser.add_argument(
        "--packages", nargs="+", default=DEBIAN_PACKAGES, help="for debian-docs: packages to read"
    )
    args = parser.parse_args(argv)
    corpus = build_corpus(args.kind, args.output, packages=args.packages)
    print(
        f"{corpus.train} {corpus.valid}: {corpus.documents} documents, {corpus.bytes / 1e6:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
