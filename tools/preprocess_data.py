"""Tokenizes text to Megatron data sets.

Inputs: files of JSON lines, plain text or Parquet, compressed or not, folders, globs, pipes.
Outputs: `<prefix>_<key>_document.bin` and `.idx` for every key, with the documents in the order of
the input, for `--data-path <prefix>_<key>_document`.

Design notes:
- The flags are those of Megatron-LM's tool, and tokenizers and file format are Megatron's, so that
  scripts and data work with both.
- Memory does not grow with the input.
- After a kill at any moment the same command resumes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sffn.data.text.sources import find_sources
from megatron_sffn.data.tokenize.encoder_spec import EncoderSpec, Loaded, tokenizer_files
from megatron_sffn.data.tokenize.fast_tokenizers import MAKERS
from megatron_sffn.data.tokenize.preprocess import Job, Work, list_reasons, preprocess
from megatron_sffn.data.tokenize.ray_workers import connected
from megatron_sffn.data.tokenize.workers import encode_in_order
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.human_size import human_size
from megatron_sffn.utils.stderr import say
from megatron_sffn.utils.warning_filters import silence


def build_parser() -> argparse.ArgumentParser:
    """Megatron-LM's flags; those of the tokenizer come from Megatron itself."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    parser = CommandParser(
        description="Tokenize text to Megatron data sets. After a kill at any moment the same "
        "command resumes.",
    )
    data = parser.add_argument_group("input data")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, globs, or - for standard input, in order; .jsonl, .json and .ndjson "
        "have a JSON object on every line, .txt is one document, .parquet has a document in every "
        "row; all formats but Parquet may be compressed (.gz, .bz2, .xz, .zst); in a folder "
        "without such files, files without an ending are read",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="keys or columns of the text; each gives a data set; a list of strings is a document "
        "of several sequences (default: text)",
    )
    data.add_argument(
        "--split-sentences",
        action="store_true",
        help="split documents into sentences with NLTK's Punkt model, which must be on this "
        "machine (NLTK_DATA); the data sets are then called <prefix>_<key>_sentence",
    )
    data.add_argument(
        "--keep-newlines",
        action="store_true",
        help="with --split-sentences, keep the white space between sentences",
    )
    data.add_argument("--lang", default="english", help="language of the Punkt model")
    data.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a faulty document (default), or skip it and report file, line and reason in "
        "<prefix>_errors.jsonl",
    )
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    tokenization = parser.add_argument_group("tokenization")
    tokenization.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document id"
    )
    tokenization.add_argument(
        "--engine",
        choices=("auto", *MAKERS),
        default="auto",
        help="library that computes the ids; auto (default) takes the fastest one that gives the "
        "ids of Megatron's tokenizer",
    )
    output = parser.add_argument_group("output data")
    output.add_argument(
        "--output-prefix", required=True, help="path of the output without _<key>_document.bin"
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing output")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument(
        "--workers",
        type=int,
        default=None,
        help="worker processes (default: the cores that this process may use)",
    )
    runtime.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="encode on all CPUs of a Ray cluster: the cluster of this machine, or the one at "
        "HOST:PORT",
    )
    runtime.add_argument(
        "--partitions",
        type=int,
        default=1,
        help="accepted for compatibility: one pass writes the same files in constant memory",
    )
    runtime.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        help="documents between two progress lines (default: 1000); at most one line a second",
    )
    runtime.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="accepted for compatibility: documents always keep the order of the input",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse wrong flags, before a tokenizer is loaded or a file is written."""
    for flag in ("workers", "partitions", "log_interval"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(f"{name} {value} is less than 1; give a positive number")
    keys = " ".join(args.json_keys)
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ConfigError(f"--json-keys {keys} names a key twice; name each once")
    if "/" in keys:
        raise ConfigError(
            f"--json-keys {keys} has a /, which no file can have in its name; rename the key"
        )
    folder = Path(f"{args.output_prefix}_").parent
    if not folder.is_dir():
        raise ConfigError(
            f"--output-prefix {args.output_prefix} lies in {folder}, which is no folder; "
            "create it first"
        )
    if args.ray and args.workers:
        raise ConfigError(
            f"--workers {args.workers} counts processes of this machine, and --ray {args.ray} uses "
            "all CPUs of a cluster; give one of them"
        )
    if args.keep_newlines and not args.split_sentences:
        say("--keep-newlines concerns --split-sentences: newlines are always kept without it")


def describe(args: argparse.Namespace) -> Job:
    """The job that the flags describe.

    Raises:
        ConfigError: an input cannot be read, or the output exists.
    """
    job = Job(
        sources=find_sources(args.input, args.json_keys, say),
        keys=tuple(args.json_keys),
        prefix=args.output_prefix,
        level="sentence" if args.split_sentences else "document",
        command=command_of(args),
        skip=args.on_error == "skip",
        overwrite=args.overwrite,
        log_interval=args.log_interval,
    )
    if str(job.report) in [source.path for source in job.sources]:
        raise ConfigError(
            f"--input leads to {job.report}, the report of this very command; move the output out "
            "of the folder of the input"
        )
    if not Path(f"{job.prefix}.partial").exists():
        job.refuse_existing()
    return job


def command_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that determine the output, with sizes and times of the tokenizer's files."""
    free = "input on_error engine output_prefix overwrite workers ray partitions log_interval"
    flags = {name: value for name, value in vars(args).items() if name not in free.split()}
    stats = [(str(file), file.stat()) for file in tokenizer_files(args)]
    flags["tokenizer_files"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return flags


def encoder_spec_of(args: argparse.Namespace) -> EncoderSpec:
    """The specification of the encoder that the flags describe."""
    return EncoderSpec(
        tokenizer=args,
        keys=tuple(args.json_keys),
        language=args.lang if args.split_sentences else None,
        keep_newlines=args.keep_newlines,
        append_eod=args.append_eod,
        engine=args.engine,
    )


@contextmanager
def workers(args: argparse.Namespace, encoder_spec: EncoderSpec, loaded: Loaded) -> Iterator[Work]:
    """The workers: processes of this machine, or of a Ray cluster."""
    if args.ray:
        with connected(args.ray, say) as cluster:
            yield cluster.work(encoder_spec, loaded)
    else:
        # Not os.cpu_count(): a container or a Slurm step may have fewer cores than the machine.
        count = args.workers or len(os.sched_getaffinity(0))
        yield partial(encode_in_order, workers=count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    # The workers are the parallelism, and the threads of the library do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    args = build_parser().parse_args(argv)
    check_arguments(args)
    job = describe(args)
    start = time.monotonic()
    encoder_spec = encoder_spec_of(args)
    loaded = encoder_spec.load()
    try:
        with workers(args, encoder_spec, loaded) as work:
            state = preprocess(
                job, lambda sample: encoder_spec.encoder(loaded, sample, say), work, say
            )
    except KeyboardInterrupt:  # preprocess has told the user
        return 130
    seconds = time.monotonic() - start
    for prefix, tokens in zip(job.prefixes, state.tokens, strict=True):
        print(
            f"{prefix}: {state.documents} documents, {tokens} tokens "
            f"of {human_size(state.num_bytes)} in {seconds:.1f} s"
        )
    if state.skipped:
        print(f"{job.report}: {state.skipped} documents left out ({list_reasons(job.report)})")
    return 0


if __name__ == "__main__":
    run_command(main)
