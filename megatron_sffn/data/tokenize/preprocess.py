"""Text in, a tokenized Megatron data set out.

Enters: sources of text, and a tokenizer. Leaves: `<prefix>_<key>_document.bin` and `.idx` for every
key (`_sentence` where documents are cut into sentences), one document for each of the input, in
its order; and `<prefix>_errors.jsonl`, if documents were left out.

Choices
- One process reads and writes, others encode, here or elsewhere.
- What is written is on the disk every `SAVE_SECONDS`, with a note of how far it is, so the same
  command goes on after a kill.
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
    """What to make, and of what.

    Args:
        sources: of the text.
        keys: of the texts in a document, each of which gives a data set.
        prefix: path and first part of the name of every file.
        level: `document` or `sentence`, the last part.
        command: the flags that determine the ids, by name.
        skip: leave out documents that are wrong, and report them; else stop at the first.
        overwrite: replace files that are there.
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
        """The data sets, without the endings of their files."""
        return [Path(f"{self.prefix}_{key}_{self.level}") for key in self.keys]

    @property
    def report(self) -> Path:
        """File of the documents that are left out."""
        return Path(f"{self.prefix}_errors.jsonl")

    @property
    def files(self) -> list[Path]:
        """All files, in the order in which they get their names."""
        pairs = [(f"{prefix}.bin", f"{prefix}.idx") for prefix in self.prefixes]
        return [*map(Path, chain.from_iterable(pairs)), self.report]

    def refuse_existing(self) -> None:
        """Refuse to replace files, unless that is asked for."""
        if not self.overwrite:
            refuse_existing(self.files if self.skip else self.files[:-1])

    @property
    def repeatable(self) -> bool:
        """Whether all sources can be read again."""
        return total_size(self.sources) is not None


def preprocess(
    job: Job, make_encoder: Callable[[list[str]], Encoder], work: Work, say: Say
) -> State:
    """Make the data sets.

    Args:
        job: what to make, and of what.
        make_encoder: gives an encoder for texts such as these of the input.
        work: encodes chunks, and gives what becomes of them in their order.
        say: told what a user should know, a sentence each time.

    Returns:
        What was done, by this run and those before it that were killed.

    Raises:
        ConfigError: a document is wrong, there is no text, the disk is full, or files exist.
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
            say(f"going on in {run_state.folder}, after {state.documents} documents")
        start = state or State(tokens=(0,) * len(job.keys))
        return _run(job, run_state, start, make_encoder, work, say)
    except KeyboardInterrupt:
        then = "goes on from the last note of how far it was" if run_state.saved else "starts anew"
        say(f"interrupted; the same command {then}")
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = "which goes on where it stopped" if run_state.saved else "which starts anew"
        raise ConfigError(
            f"{run_state.folder} has no room ({error.strerror}); free some and give the same "
            f"command, {kept}"
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
        # There is nothing to report, and a report of older files would mislead.
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
        "processed", total_size(job.sources), done=start.consumed, line_seconds=LINE_SECONDS
    )
    lines_reached = start.documents // job.log_interval
    last_save = time.monotonic()
    for encoded in results:
        if encoded.faults and not job.skip:
            _keep_for_another_try(run_state, output, say)
            raise DocumentError(encoded.faults[0])
        output.add(encoded)
        state = output.state
        if state.documents // job.log_interval > lines_reached and progress.is_due:
            lines_reached = state.documents // job.log_interval
            rate = (state.num_bytes - start.num_bytes) / progress.seconds
            what = (
                f"{state.documents} documents, {human_size(state.num_bytes)} "
                f"({rate / 1e6:.1f} MB/s), {sum(state.tokens) / 1e6:.2f} M tokens"
            )
            progress.print(what, state.consumed)
        if job.repeatable and time.monotonic() - last_save >= SAVE_SECONDS:
            run_state.save(output.sync())
            last_save = time.monotonic()


def sample_texts(job: Job, first: Sequence[TextChunk]) -> list[str]:
    """Texts from the heads of several sources, cut where they are long."""
    regular = [source for source in job.sources if source.size is not None]
    some = regular[:: -(-len(regular) // SAMPLED_SOURCES) or 1]
    heads = [next(read_chunks([source], columns=job.keys), None) for source in some]
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
    """The data sets that a job writes, the report, and how far they are."""

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
        """Wait until everything is on the disk; returns how far that is."""
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


def _keep_for_another_try(run_state: RunState, output: _Output, say: Say) -> None:
    """Hours of work should not be lost to one bad document."""
    if run_state.saved:
        documents = output.sync().documents
        run_state.save(output.state)
        say(
            f"{run_state.folder} keeps {documents} documents: the same command goes on there, also "
            "with --on-error skip"
        )


def _refuse_no_text(job: Job, run_state: RunState, output: _Output) -> None:
    """Refuse a data set without a token; the reasons are in the sentence, as no report stays."""
    state = output.state
    for key, tokens in zip(job.keys, state.tokens, strict=True):
        if tokens:
            continue
        message = f"the input holds {state.documents} documents and no text under {key!r}"
        if state.skipped:
            output.sync()
            reasons = list_reasons(run_state.folder / job.report.name)
            left = "all" if not state.documents else "the other"
            message = f"{message}, and {left} {state.skipped} were left out ({reasons})"
        run_state.discard()
        raise ConfigError(f"{message}; give files with text")


def list_reasons(report: Path) -> str:
    """Why documents were left out, and how many for each reason."""
    reasons = count_reasons(report).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in reasons)


def count_reasons(report: Path) -> Counter[str]:
    """How many documents were left out for each reason."""
    with report.open("rb") as file:
        return Counter(json.loads(line)["reason"].partition(" (")[0] for line in file)
