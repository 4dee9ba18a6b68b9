"""Times tokenization, ours and Megatron-LM's: `python -m benchmarks.preprocess --sizes 50 500`.

Inputs: sizes in MB, and text, or none to use the Python sources of this environment. Outputs: a
table of MB/s and peak memory, and, with `--output`, rows of a CSV file.

Design notes:
- Four contenders read the same file: `encode_batch` of the library `tokenizers` on all cores, with
  texts that are already parsed and without output; Megatron-LM's tool, a pool of processes that
  call Megatron's tokenizer per text, and one process that calls its `IndexedDatasetBuilder`; and
  `tools/preprocess_data.py` with each engine.
- Results are printed only if all contenders made the same ids, and files of the same bytes.
- Memory is the sum over all processes of a contender, with shared pages counted once (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.agreement import DisagreementError, refusing
from benchmarks.machine import ROOT, Platform, adapt, facts, version_of
from benchmarks.preprocess.contenders import CONTENDERS, UNIT
from benchmarks.preprocess.text import texts_of, train_tokenizer, write_text
from benchmarks.rows import append, check_output
from megatron_sffn.utils.errors import ConfigError

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of a contender; also the columns of the CSV file.

    Args:
        date, commit, device, torch, megatron_core: see `benchmarks.machine.facts`.
        tokenizers, gigatoken: versions.
        contender: see the module.
        vocab_size: vocabulary size of the tokenizer.
        workers: processes, or threads.
        megabytes: size of the JSON lines.
        distinct: megabytes of them that are not repeated.
        documents, tokens: number of documents and tokens.
        seconds: time of the fastest round.
        peak_gb: largest memory of all processes.
    """

    date: str
    commit: str
    device: str
    torch: str
    megatron_core: str
    tokenizers: str
    gigatoken: str
    contender: str
    vocab_size: int
    workers: int
    megabytes: float
    distinct: float
    documents: int
    tokens: int
    seconds: float
    peak_gb: float


def command(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments(argv)
    if args.output:
        check_output(args.output, Row)
    adapt()
    return refusing(lambda: run(args))


def run(args: Namespace) -> int:
    """Measure and print all sizes."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for megabytes in args.sizes:
            rows = measure(args, Path(folder), megabytes)
            print(table(rows), flush=True)
            if args.output:
                append(rows, args.output)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocess",
        description="Time and memory of tokenizing text, ours and Megatron-LM's way.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[50], help="MB of text (default: 50)")
    add("--input", nargs="+", help="text, as preprocess_data.py reads it; repeated if too short")
    add(
        "--vocab-size", type=int, default=16384, help="vocabulary of the tokenizer (default: 16384)"
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes or threads (default: one per core)",
    )
    add("--rounds", type=int, default=1, help="rounds; the fastest counts (default: 1)")
    add(
        "--folder",
        type=Path,
        help="folder for files of 3 times the size of the text (default: /tmp)",
    )
    add("--output", type=Path, help="append rows to this CSV file")
    args = parser.parse_args(argv)
    for flag, values in (("sizes", args.sizes), ("rounds", [args.rounds])):
        if min(values) < 1:
            raise ConfigError(f"--{flag} {min(values)} is less than 1; give at least 1")
    return args


def measure(args: Namespace, folder: Path, megabytes: int) -> list[Row]:
    """The rows of one size."""
    text = folder / f"{megabytes}.jsonl"
    documents, distinct = write_text(text, texts_of(args.input), megabytes * 10**6)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(tokenizer, text, args.vocab_size)
    best: dict[str, tuple[float, float]] = {}
    reports: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            report, peak = run_contender(args, name, text, tokenizer, folder / "out")
            reports[name] = report
            seconds, former_peak = best.get(name, (float("inf"), 0.0))
            best[name] = min(seconds, report["seconds"]), max(former_peak, peak)
    check(reports)
    common = facts(Platform.here(), args.output)
    versions = {name: version_of(name) for name in ("tokenizers", "gigatoken")}
    return [
        Row(
            **common,
            **versions,
            contender=name,
            vocab_size=args.vocab_size,
            workers=args.workers,
            megabytes=text.stat().st_size / 1e6,
            distinct=distinct / 1e6,
            documents=documents,
            tokens=reports[name]["tokens"],
            seconds=seconds,
            peak_gb=peak / 1e9,
        )
        for name, (seconds, peak) in best.items()
    ]


def check(reports: dict[str, dict[str, Any]]) -> None:
    """Raise an error if contenders made different ids or files."""
    for content in ("ids", "index"):
        digests = {name: report[content] for name, report in reports.items() if content in report}
        if len(set(digests.values())) > 1:
            raise DisagreementError(f"the contenders made different {content}: {digests}")


def table(rows: Sequence[Row]) -> str:
    """The rows of one size as a table."""
    first = rows[0]
    seconds = {row.contender: row.seconds for row in rows}
    lines = [
        f"{first.device}, {first.workers} workers; {first.megabytes:.0f} MB of JSON lines "
        f"({first.distinct:.0f} MB distinct), {first.documents:,} documents, {first.tokens:,} "
        f"tokens, {first.vocab_size:,} ids; tokenizers {first.tokenizers}, gigatoken "
        f"{first.gigatoken}; same ids, same files",
        "",
        f"{'':22}    MB/s  over {UNIT}  over encode_batch  peak memory",
    ]
    for row in rows:
        lines.append(
            f"{row.contender:22} {row.megabytes / row.seconds:7.1f} "
            f"{seconds[UNIT] / row.seconds:{len(UNIT) + 6}.2f} "
            f"{seconds['encode_batch'] / row.seconds:18.2f} {row.peak_gb:9.2f} GB"
        )
    return "\n".join(lines) + "\n"


def run_contender(
    args: Namespace, name: str, text: Path, tokenizer: Path, prefix: Path
) -> tuple[dict[str, Any], float]:
    """Run a contender; return its report, and the peak of its memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.preprocess.contenders", "--contender", name]
    command += ["--text", str(text), "--prefix", str(prefix), "--tokenizer", str(tokenizer)]
    command += ["--workers", str(args.workers)]
    print(f"{name} ...", file=sys.stderr, flush=True)
    peak = 0.0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise ConfigError(f"{name} ended with exit code {process.returncode}; see above")
    return json.loads(lines[-1]), peak


def memory_of(pid: int) -> float:
    """Bytes of a process and its children, with shared pages in proportion."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # a process has ended meanwhile
        pass
    return float(total)
