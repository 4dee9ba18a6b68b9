"""JSON lines in, a tokenized Megatron dataset out.

Enters: files with one JSON object per line. Leaves: `<prefix>_<key>_document.bin` and `.idx` for
every key, one document per line, in the order of the lines, for
`--data-path <prefix>_<key>_document`.
Choices: Megatron-LM's flags, and Megatron's own tokenizers and file format, so that existing
scripts and data keep working. Workers are forked after the tokenizer is loaded: they share it and
import nothing again. The main process holds at most `BATCHES_PER_WORKER` batches per worker,
whatever the size of the input. Files are written under temporary names and renamed when complete.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import secrets
import signal
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import numpy as np

from megatron_sffn.data.jsonl import Line, check_inputs, read_lines, texts_of
from megatron_sffn.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sffn.errors import ConfigError, run_command

BATCH_BYTES = 256 * 1024
BATCHES_PER_WORKER = 4


def batched(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in lists of about `BATCH_BYTES`: long documents travel alone, short ones together."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """The ids of a batch: `documents[i][j]` belongs to line i and key j."""

    documents: list[list[np.ndarray]]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns lines into ids.

    Args:
        tokenizer: what Megatron's `build_tokenizer` returned.
        keys: JSON keys to read from every line.
        append_eod: end every document that is not empty with the tokenizer's eod.
        dtype: numpy type of the ids on disk.
    """

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    dtype: type[np.number]

    def __call__(self, batch: list[Line]) -> EncodedBatch:
        """Encode a batch; the first bad line raises `ConfigError`."""
        documents = [
            [self._encode(line, text) for text in texts_of(line, self.keys)] for line in batch
        ]
        return EncodedBatch(documents=documents, num_bytes=sum(len(line.content) for line in batch))

    def _encode(self, line: Line, text: str) -> np.ndarray:
        try:
            ids = list(self.tokenizer.tokenize(text))
        except ValueError as error:
            raise ConfigError(
                f"the tokenizer cannot encode {line} ({error}); choose one that fits the text"
            ) from error
        if ids and self.append_eod:
            assert self.tokenizer.eod is not None
            ids.append(self.tokenizer.eod)
        array = np.array(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.tokenizer.vocab_size:
            raise ConfigError(
                f"the tokenizer turned {line} into ids {array.min()} to {array.max()}, outside its "
                f"vocabulary of {self.tokenizer.vocab_size}; raise --vocab-size or repair its files"
            )
        return array.astype(self.dtype)


Encode = Callable[[list[Line]], EncodedBatch]

# What a worker process runs. A global, because a task can reach nothing else of its worker, and
# sending the tokenizer with every task costs more than the task.
_encode: Encode | None = None


def _start_worker(encode: Encode) -> None:
    global _encode
    _encode = encode
    # Ctrl-C reaches every process; the main one ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # Workers of a killed process would wait for tasks for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Line]) -> EncodedBatch:
    assert _encode is not None
    return _encode(batch)


def encode_in_order(
    encode: Encode, batches: Iterable[list[Line]], workers: int
) -> Generator[EncodedBatch, None, None]:
    """Encode batches on `workers` processes; results come in the order of the batches.

    A process pool's own `map` reads all of its input at once; here input is read only as results
    are taken, so memory stays bounded.
    """
    if workers == 1:
        yield from map(encode, batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encode,),
    )
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"one of the --workers {workers} processes was killed, most often for lack of memory; "
            "use fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class Output:
    """The `.bin` and `.idx` of one key: temporary names until `publish`."""

    def __init__(self, prefix: str, key: str, dtype: type[np.number]) -> None:
        """Open the temporary files, and remove those that a killed run left."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = f"{prefix}_{key}_document"
        self.num_tokens = 0
        self._bin, self._idx = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        for final in (self._bin, self._idx):
            for stale in final.parent.glob(f"{escape(final.name)}.*.partial"):
                stale.unlink()
        # A name of its own: should two runs write the same prefix at once, the one that started
        # first fails at its rename, and the files of the two never mix.
        mark = f".{secrets.token_hex(4)}.partial"
        self._partial_bin, self._partial_idx = (
            Path(f"{self._bin}{mark}"),
            Path(f"{self._idx}{mark}"),
        )
        try:
            self._builder = IndexedDatasetBuilder(str(self._partial_bin), dtype=dtype)
        except OSError as error:
            raise ConfigError(
                f"{self._bin} cannot be written ({error.strerror}); give another --output-prefix"
            ) from error

    def add(self, ids: np.ndarray) -> None:
        """Append a document. As in Megatron-LM, an empty one has no sequence."""
        self._builder.add_document(ids, [ids.size] if ids.size else [])
        self.num_tokens += ids.size

    def publish(self) -> None:
        """Give the files their final names: a reader finds both, or no index."""
        self._builder.finalize(str(self._partial_idx))
        self._idx.unlink(missing_ok=True)
        self._partial_bin.replace(self._bin)
        self._partial_idx.replace(self._idx)

    def discard(self) -> None:
        """Remove what was not published."""
        self._builder.data_file.close()
        self._partial_bin.unlink(missing_ok=True)
        self._partial_idx.unlink(missing_ok=True)


class Progress:
    """Lines on stderr, one every `interval` documents."""

    def __init__(self, paths: Sequence[str], interval: int) -> None:
        """Start the clock on the files of `paths`."""
        stats = [os.stat(path) for path in paths]
        # The length of a pipe is unknown; then there is no ETA.
        known = all(stat.S_ISREG(entry.st_mode) for entry in stats)
        self._total = sum(entry.st_size for entry in stats) if known else None
        self._interval = interval
        self._start = time.monotonic()
        self.documents = self.num_bytes = 0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    def update(self, batch: EncodedBatch, num_tokens: int) -> None:
        """Count a batch, and print when an interval is full."""
        before = self.documents // self._interval
        self.documents += len(batch.documents)
        self.num_bytes += batch.num_bytes
        if self.documents // self._interval > before:
            print(self._line(num_tokens), file=sys.stderr, flush=True)

    def _line(self, num_tokens: int) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-6)
        line = (
            f"processed {self.documents} documents, {self.num_bytes / 1e6:.1f} MB "
            f"({rate / 1e6:.2f} MB/s), {num_tokens / 1e6:.2f} M tokens"
        )
        if self._total is None:
            return line
        eta = max(0, round((self._total - self.num_bytes) / rate))
        return f"{line}, ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"


def preprocess(
    encoder: Encoder, inputs: Sequence[str], prefix: str, *, workers: int, log_interval: int = 1000
) -> list[Output]:
    """Encode `inputs` into the files of `prefix`, one pair per key of the encoder.

    Args:
        encoder: what to do with a line.
        inputs: paths of JSON-lines files.
        prefix: path and first part of the name of every file written.
        workers: number of processes.
        log_interval: documents between two progress lines.

    Returns:
        The published outputs, in the order of the encoder's keys.

    Raises:
        ConfigError: a bad line, or nothing to write; no file is left.
    """
    progress = Progress(inputs, log_interval)
    outputs: list[Output] = []
    try:
        for key in encoder.keys:
            outputs.append(Output(prefix, key, encoder.dtype))
        with closing(encode_in_order(encoder, batched(read_lines(inputs)), workers)) as encoded:
            for batch in encoded:
                for document in batch.documents:
                    for output, ids in zip(outputs, document, strict=True):
                        output.add(ids)
                progress.update(batch, sum(output.num_tokens for output in outputs))
        for key, output in zip(encoder.keys, outputs, strict=True):
            if not output.num_tokens:
                raise ConfigError(
                    f"--input {' '.join(inputs)} holds {progress.documents} documents and no text "
                    f"under {key!r}; give files with text"
                )
        for output in outputs:
            output.publish()
    finally:
        for output in outputs:
            output.discard()
    for output in outputs:
        print(
            f"{output.prefix}: {progress.documents} documents, {output.num_tokens} tokens "
            f"of {progress.num_bytes / 1e6:.1f} MB in {progress.seconds:.1f} s",
            flush=True,
        )
    return outputs


def build_parser() -> argparse.ArgumentParser:
    """Megatron-LM's flags; those of the tokenizer come from Megatron itself."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    parser = argparse.ArgumentParser(
        description="Tokenize JSON lines into a Megatron dataset.", allow_abbrev=False
    )
    data = parser.add_argument_group("input data")
    data.add_argument("--input", nargs="+", required=True, help="JSON-lines files, in order")
    data.add_argument("--json-keys", nargs="+", default=["text"], help="keys to extract")
    data.add_argument("--split-sentences", action="store_true", help="not available yet")
    data.add_argument(
        "--keep-newlines",
        action="store_true",
        help="accepted for compatibility: it concerns --split-sentences; newlines are always kept",
    )
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    tokenization = parser.add_argument_group("tokenization")
    tokenization.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document id"
    )
    output = parser.add_argument_group("output data")
    output.add_argument(
        "--output-prefix", required=True, help="path of the output without _<key>_document.bin"
    )
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument(
        "--workers", type=int, default=None, help="processes; default: the cores of this machine"
    )
    runtime.add_argument("--partitions", type=int, default=1, help="only 1 so far")
    runtime.add_argument(
        "--log-interval", type=int, default=1000, help="documents between two progress lines"
    )
    runtime.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="accepted for compatibility: documents always keep the order of the lines",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before a tokenizer is loaded or a file is made."""
    if args.split_sentences:
        raise ConfigError(
            "--split-sentences is not available in this version, which writes one sequence per "
            "document; leave it out"
        )
    if args.partitions != 1:
        raise ConfigError(
            f"--partitions {args.partitions} is not available in this version; leave it out and "
            "use --workers: memory does not grow with the input"
        )
    for flag, value in (("--workers", args.workers), ("--log-interval", args.log_interval)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value} is less than 1; give a positive number")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ConfigError(
            f"--json-keys {' '.join(args.json_keys)} names a key twice; name each once"
        )
    check_inputs(args.input)
    folder = Path(args.output_prefix).parent
    if not folder.is_dir():
        raise ConfigError(
            f"--output-prefix {args.output_prefix} lies in {folder}, which is no folder; "
            "create it first"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    # Megatron warns of every accelerator library that is absent; none of them matters here.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # torch looks for CUDA when it is imported; its absence does not matter either.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Workers are the parallelism here, and the threads of the library do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    args = build_parser().parse_args(argv)
    check_arguments(args)

    from megatron.core.datasets.indexed_dataset import DType

    tokenizer = load_tokenizer(args, need_eod=args.append_eod)
    encoder = Encoder(
        tokenizer=tokenizer,
        keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
    )
    preprocess(
        encoder,
        args.input,
        args.output_prefix,
        # Not os.cpu_count(): in a container or a Slurm step fewer cores may be ours.
        workers=args.workers or len(os.sched_getaffinity(0)),
        log_interval=args.log_interval,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
