"""Makes data sets from available text: `python -m examples.data CORPUS ... --output DIR`.

Inputs: Debian's documentation, a folder of files, Parquet shards, or the files of WikiText-103 or
enwik8. Outputs: a folder with a tokenizer and the data sets `train_text_document`,
`valid_text_document` and `test_text_document`, and the flags to train on them.

Design notes:
- The tools do the work, and their commands are printed.
- Exact duplicates are removed from text without a published split, which is then split by bytes, in
  the order of a hash of each document.
- The folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from examples.data import published
from examples.data.files import folder_documents, write_documents
from examples.quickstart import data
from examples.quickstart.corpus import DEBIAN_PACKAGES, debian_documents
from megatron_sffn.data.corpus.split import parse_parts
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.stderr import say

EXAMPLE = """\
examples:
  .venv/bin/python -m examples.data debian-docs --output data/debian
  .venv/bin/python -m examples.data folder ~/notes --suffixes .md .rst --output data/notes
  .venv/bin/python -m examples.data parquet shards/*.parquet --json-key content --output data/web
  .venv/bin/python -m examples.data wikitext-103 wikitext-103-raw-v1.zip --output data/wikitext
  .venv/bin/python -m examples.data enwik8 enwik8.zip --output data/enwik8
"""


def build_parser() -> argparse.ArgumentParser:
    """A subcommand for each corpus."""
    parser = CommandParser(
        prog="python -m examples.data",
        description="Make a tokenizer, and data sets for train, valid and test.",
        epilog=EXAMPLE,
    )
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    debian = corpora.add_parser("debian-docs", help="Debian documentation packages, by apt-get")
    debian.add_argument("--packages", nargs="+", default=DEBIAN_PACKAGES, metavar="P")
    folder = corpora.add_parser("folder", help="text files below a folder")
    folder.add_argument("folder", type=Path, metavar="DIR")
    folder.add_argument("--suffixes", nargs="+", default=(), metavar=".S", help="(default: all)")
    parquet = corpora.add_parser("parquet", help="Parquet shards, with a document in each row")
    parquet.add_argument("shards", nargs="+", metavar="FILE", help="files, folders, globs")
    parquet.add_argument("--json-key", default="text", help="column of the text (default: text)")
    wikitext = corpora.add_parser("wikitext-103", help="archive or files, in the published split")
    wikitext.add_argument("path", type=Path, metavar="PATH")
    enwik8 = corpora.add_parser("enwik8", help="archive or file, as bytes, in the published split")
    enwik8.add_argument("path", type=Path, metavar="PATH")
    for corpus in (debian, folder, parquet, wikitext, enwik8):
        corpus.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    for corpus in (debian, folder, parquet, wikitext):
        corpus.add_argument("--tokenizer", metavar="DIR", help="tokenizer (default: train one)")
        corpus.add_argument("--vocab-size", type=int, default=16384, help="(default: 16384)")
    for corpus in (debian, folder, parquet):
        corpus.add_argument(
            "--parts", default="train=0.98,valid=0.01,test=0.01", help="(default: %(default)s)"
        )
    return parser


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to its final name at the end.

    Raises:
        ConfigError: the folder exists or cannot be made.
    """
    if folder.exists():
        raise ConfigError(f"--output {folder} is there already; give another, or remove it")
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be made ({error.strerror}); give another"
        ) from error
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run(name: str, *words: str) -> None:
    """Print and run the command of a tool."""
    say(f"\n$ tools/{name}.py {shlex.join(words)}")
    data.run_tool(name, *words)


def split_text(inputs: Sequence[str], key: str, parts: str, folder: Path) -> None:
    """Make `train.jsonl`, `valid.jsonl` and `test.jsonl` from text without a published split."""
    unique = str(folder / "unique")
    run("dedup_dataset", "--input", *inputs, "--json-key", key, "--output-prefix", unique)
    corpus = ("--input", f"{unique}.jsonl", "--json-key", key, "--parts", parts, "--by", "bytes")
    run("split_dataset", *corpus, "--output-prefix", str(folder / "part"))
    Path(f"{unique}.jsonl").unlink()
    for name in published.PARTS:
        (folder / f"part_{name}.jsonl").rename(folder / f"{name}.jsonl")


def tokenize(args: argparse.Namespace, key: str, folder: Path) -> None:
    """Train a tokenizer, if none is given, and make the data sets."""
    tokenizer = args.tokenizer or str(folder / "tokenizer")
    if not args.tokenizer:
        text = ("--input", str(folder / "train.jsonl"), "--json-key", key)
        run("train_tokenizer", *text, "--vocab-size", str(args.vocab_size), "--output", tokenizer)
    for part in published.PARTS:
        run(
            "preprocess_data",
            *("--input", str(folder / f"{part}.jsonl"), "--json-keys", key),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer),
            *("--append-eod", "--output-prefix", str(folder / part)),
        )


def check_parts(parts: str) -> None:
    """Refuse names of parts for which training has no flag."""
    if set(parse_parts(parts, seed=0).names) != set(published.PARTS):
        raise ConfigError(
            f"--parts {parts} does not name {', '.join(published.PARTS)}, each once; give their "
            "shares, such as train=0.98,valid=0.01,test=0.01"
        )


def make(args: argparse.Namespace, folder: Path) -> None:
    """Fill the folder."""
    key = "text"
    if args.corpus == "enwik8":
        published.enwik8(args.path, folder)
        run("train_tokenizer", "--bytes", "--output", str(folder / "tokenizer"))
        return
    if args.corpus == "wikitext-103":
        parts = published.wikitext_103(args.path, folder)
        record = {name: asdict(part) for name, part in parts.items()}
        (folder / "parts.json").write_text(json.dumps(record, indent=2) + "\n")
    elif args.corpus == "parquet":
        key = args.json_key
        split_text(args.shards, key, args.parts, folder)
    else:
        documents = folder / "documents.jsonl"
        write_documents(
            folder_documents(args.folder, args.suffixes)
            if args.corpus == "folder"
            else debian_documents(folder / "packages", args.packages),
            documents,
        )
        split_text([str(documents)], key, args.parts, folder)
        # The report names lines of this file.
        (folder / "unique_duplicates.jsonl").unlink()
        documents.unlink()
    tokenize(args, key, folder)


def training_flags(args: argparse.Namespace) -> str:
    """The flags to train on the data sets, for the command line."""
    key = args.json_key if args.corpus == "parquet" else "text"
    tokenizer = getattr(args, "tokenizer", None) or args.output / "tokenizer"
    lines = [f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"]
    lines += [f"--{part}-data-path {args.output}/{part}_{key}_document" for part in published.PARTS]
    return " \\\n    ".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if "parts" in args:
        check_parts(args.parts)
    try:
        with atomic_folder(args.output) as folder:
            make(args, folder)
    except data.ToolFailedError as error:
        say(f"error: {error}")
        return 1
    print(f"\n{args.output} is complete; train on it with\n    {training_flags(args)}")
    return 0


if __name__ == "__main__":
    run_command(main)
