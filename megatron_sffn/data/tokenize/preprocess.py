"""Tokenizes text to Megatron data sets.

Inputs: sources of text, and an encoder. Outputs: `<prefix>_<key>_document.bin` and `.idx` for every
key (`_sentence` if documents are split into sentences), with the documents in the order of the
input; and `<prefix>_errors.jsonl`, if documents were left out.

Design notes:
- One process reads and writes; workers encode, on this machine or on others.
- Every `SAVE_SECONDS` the output is on the disk and the state of the run is saved, so that the same
  command resumes after a kill.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_sffn.data.output.atomic_output import FULL, refuse_existing
from megatron_sffn.data.output.progress import Progress
from megatron_sffn.data.output.run_state import RunState, State
from megatron_sffn.data.text.chunks import TextChunk, read_chunks
from megatron_sffn.data.text.documents import DocumentError, documents_of
from megatron_sffn.data.text.sources import Source, total_size
from megatron_sffn.data.tokenize.dataset_writer import DatasetWriter
from megatron_sffn.data.tokenize.encoder import Encoded, Encoder
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.human_size import human_size

SAVE_SECONDS = 10.0
LINE_SECONDS = 1.0
SAMPLE_BYTES = 1 << 20
SAMPLED_SOURCES = 8
LONGEST_SAMPLE = 1 << 16

Say = Callable[[str], None]
Work = Callable[[Encoder, Iterable[TextChunk]], Generator[Encoded, None, None]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input and the output of a run.

    Args:
        sources: the input.
        keys: keys of the texts in a document; each key gives a data set.
        prefix: path and first part of the name of every file.
        level: `document` or `sentence`, the last part of the name.
        command: flag -> value for the flags that determine the ids.
        skip: leave out faulty documents and report them; otherwise stop at the first.
        overwrite: replace existing files.
        log_interval: documents between two lines of progress.
    """

    sources: Sequence[Source]
    keys: tuple[str, ...]
    prefix: str
    level: str
    command: Mapping[str, Any]
    skip: bool
    overwrite: bool
    log_interval: int

    @property
    def prefixes(self) -> list[Path]:
        """Paths of the data sets, without the endings of their files."""
        return [Path(f"{self.prefix}_{key}_{self.level}") for key in self.keys]

    @property
    def report(self) -> Path:
        """Path of the report on documents that are left out."""
        return Path(f"{self.prefix}_errors.jsonl")

    @property
    def files(self) -> list[Path]:
        """Paths of all files, in the order of the renames."""
        pairs = [(f"{prefix}.bin", f"{prefix}.idx") for prefix in self.prefixes]
        return [*map(Path, chain.from_iterable(pairs)), self.report]

    def refuse_existing(self) -> None:
        """Refuse to replace files without `overwrite`."""
        if not self.overwrite:
            refuse_existing(self.files if self.skip else self.files[:-1])

    @property
    def repeatable(self) -> bool:
        """True if all sources can be read again."""
        return total_size(self.sources) is not None


def preprocess(
    job: Job, make_encoder: Callable[[list[str]], Encoder], work: Work, say: Say
) -> State:
    """Make the data sets.

    Args:
        job: input and output.
        make_encoder: builds an encoder, given sample texts of the input.
        work: encodes chunks, with results in order.
        say: receives lines for the user.

    Returns:
        The final state, including the work of earlier runs that were killed.

    Raises:
        ConfigError: a document is faulty, there is no text, the disk is full, or files exist.
    """
    inputs = [(source.path, source.size, source.modified) for source in job.sources]
    run_state = RunState(job.prefix, job.files, {**job.command, "inputs": inputs}, say)
    try:
        state = run_state.resume(repeatable=job.repeatable)
        if state is not None and state.complete:
            run_state.discard()
            return state
        job.refuse_existing()
        if state is not None:
            say(f"resuming in {run_state.folder}, after {state.documents} documents")
        start = state or State(tokens=(0,) * len(job.keys))
        return _run(job, run_state, start, make_encoder, work, say)
    except KeyboardInterrupt:
        next_run = "resumes from the last save" if run_state.saved else "starts anew"
        say(f"interrupted; the same command {next_run}")
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        next_run = "which resumes where it stopped" if run_state.saved else "which starts anew"
        raise ConfigError(
            f"{run_state.folder} has no room ({error.strerror}); free some and give the same "
            f"command, {next_run}"
        ) from error
    finally:
        run_state.close()


def _run(
    job: Job,
    run_state: RunState,
    start: State,
    make_encoder: Callable[[list[str]], Encoder],
    work: Work,
    say: Say,
) -> State:
    chunks = read_chunks(job.sources, columns=job.keys, start=start.position)
    first = list(islice(chunks, 1))
    encoder = make_encoder(sample_texts(job, first))
    with (
        closing(_Output(job, run_state.folder, encoder, start)) as output,
        closing(work(encoder, chain(first, chunks))) as results,
    ):
        _write(results, output, job, run_state, start, say)
        _refuse_no_text(job, run_state, output)
        if job.repeatable:
            run_state.save(output.sync())
        output.finish()
    if not (job.skip or output.state.skipped):
        # There is nothing to report, and the report of an earlier run would mislead.
        (run_state.folder / job.report.name).unlink()
        job.report.unlink(missing_ok=True)
    run_state.finish(output.state)
    return output.state


def _write(
    results: Iterable[Encoded],
    output: _Output,
    job: Job,
    run_state: RunState,
    start: State,
    say: Say,
) -> None:
    """Write the ids as they come, save the state of the run, and print progress."""
    progress = Progress(
        "processed",
        total_size(job.sources),
        done=start.consumed,
        line_seconds=LINE_SECONDS,
        at_once=True,
    )
    lines_reached = start.documents // job.log_interval
    last_save = time.monotonic()
    for encoded in results:
        if encoded.faults and not job.skip:
            _save_before_error(run_state, output, say)
            raise DocumentError(encoded.faults[0])
        output.add(encoded)
        state = output.state
        if state.documents // job.log_interval > lines_reached and progress.is_due:
            lines_reached = state.documents // job.log_interval
            rate = (state.num_bytes - start.num_bytes) / progress.seconds
            progress_text = (
                f"{state.documents} documents, {human_size(state.num_bytes)} "
                f"({rate / 1e6:.1f} MB/s), {sum(state.tokens) / 1e6:.2f} M tokens"
            )
            progress.print(progress_text, state.consumed)
        if job.repeatable and time.monotonic() - last_save >= SAVE_SECONDS:
            run_state.save(output.sync())
            last_save = time.monotonic()


def sample_texts(job: Job, first: Sequence[TextChunk]) -> list[str]:
    """Sample texts from the first chunks of several sources; long texts are truncated."""
    files = [source for source in job.sources if source.size is not None]
    sampled = files[:: -(-len(files) // SAMPLED_SOURCES) or 1]
    heads = [next(read_chunks([source], columns=job.keys), None) for source in sampled]
    chunks = [*first, *filter(None, heads)]
    texts = []
    for chunk in chunks:
        size = 0
        for document in documents_of(chunk):
            with suppress(DocumentError):
                sequences = chain.from_iterable(document.sequences(job.keys))
                texts += [text[:LONGEST_SAMPLE] for text in sequences]
                size += sum(map(len, texts[-len(job.keys) :]))
            if size >= SAMPLE_BYTES // len(chunks):
                break
    return texts


class _Output:
    """The data sets and the report that a run writes, with their state."""

    def __init__(self, job: Job, folder: Path, encoder: Encoder, start: State) -> None:
        self.state = start
        self._datasets = [
            DatasetWriter(folder, prefix.name, encoder.dtype, start.sizes)
            for prefix in job.prefixes
        ]
        report = folder / job.report.name
        report.touch()
        self._report = report.open("r+b")
        self._report.truncate(start.sizes.get(report.name, 0))
        self._report.seek(0, 2)

    def add(self, encoded: Encoded) -> None:
        for dataset, column in zip(self._datasets, encoded.columns, strict=True):
            dataset.add(column)
        for fault in encoded.faults:
            record = {"file": fault.path, "line": fault.number, "reason": fault.reason}
            self._report.write(json.dumps(record).encode() + b"\n")
        tokens = zip(self.state.tokens, encoded.columns, strict=True)
        self.state = replace(
            self.state,
            position=encoded.end,
            documents=self.state.documents + encoded.num_documents,
            num_bytes=self.state.num_bytes + encoded.num_bytes,
            consumed=encoded.consumed,
            tokens=tuple(before + column.ids.size for before, column in tokens),
            skipped=self.state.skipped + len(encoded.faults),
        )

    def sync(self) -> State:
        """Wait until everything is on the disk; returns the state with the sizes of the files."""
        self._report.flush()
        os.fsync(self._report.fileno())
        sizes = {Path(self._report.name).name: self._report.tell()}
        for dataset in self._datasets:
            sizes |= dataset.sync()
        self.state = replace(self.state, sizes=sizes)
        return self.state

    def finish(self) -> None:
        for dataset in self._datasets:
            dataset.finish()

    def close(self) -> None:
        for dataset in self._datasets:
            dataset.close()
        with suppress(OSError):
            self._report.close()


def _save_before_error(run_state: RunState, output: _Output, say: Say) -> None:
    """Save the state, so that a faulty document does not cost hours of work."""
    if run_state.saved:
        documents = output.sync().documents
        run_state.save(output.state)
        say(
            f"{run_state.folder} keeps {documents} documents: the same command resumes after them, "
            "also with --on-error skip"
        )


def _refuse_no_text(job: Job, run_state: RunState, output: _Output) -> None:
    """Refuse a data set without tokens; the error has the reasons, since no report is left."""
    state = output.state
    for key, tokens in zip(job.keys, state.tokens, strict=True):
        if tokens:
            continue
        message = f"the input holds {state.documents} documents and no text under {key!r}"
        if state.skipped:
            output.sync()
            reasons = list_reasons(run_state.folder / job.report.name)
            skipped = "all" if not state.documents else "the other"
            message = f"{message}, and {skipped} {state.skipped} were left out ({reasons})"
        run_state.discard()
        raise ConfigError(f"{message}; give files with text")


def list_reasons(report: Path) -> str:
    """The reasons why documents were left out, with the number of documents, as one line."""
    reasons = count_reasons(report).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in reasons)


def count_reasons(report: Path) -> Counter[str]:
    """Reason -> number of documents that were left out."""
    with report.open("rb") as file:
        return Counter(json.loads(line)["reason"].partition(" (")[0] for line in file)
