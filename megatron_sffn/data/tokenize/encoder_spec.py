"""The specification of an encoder, from which every machine of a run builds the same one.

Inputs: the flags of `tools/preprocess_data.py` that determine the ids. Outputs: an `Encoder`.

Design notes:
- An encoder holds objects of tokenizer libraries, which cannot be pickled; its specification can.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sffn.data.text.sentences import Splitter, load_splitter
from megatron_sffn.data.tokenize.encoder import Encoder
from megatron_sffn.data.tokenize.engine import MegatronEngine, dropout_of
from megatron_sffn.data.tokenize.fast_tokenizers import PROBES, choose_engine
from megatron_sffn.data.tokenize.tokenizer import (
    Tokenizer,
    changed_text,
    difference_from_file,
    load_tokenizer,
)
from megatron_sffn.utils.errors import ConfigError

ROUND_TRIPS, ROUND_TRIP_LENGTH = 25, 2000

Loaded = tuple[Tokenizer, Splitter | None]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The flags that determine the ids.

    Args:
        tokenizer: Megatron's tokenizer flags.
        keys: keys of the texts in a document.
        language: language of the sentences that texts are split into; None: do not split.
        keep_newlines: keep the white space between sentences.
        append_eod: end every document with the end-of-document id.
        engine: name of the engine, or `auto`.
    """

    tokenizer: argparse.Namespace
    keys: tuple[str, ...]
    language: str | None
    keep_newlines: bool
    append_eod: bool
    engine: str

    def load(self) -> Loaded:
        """Load the tokenizer and the sentence splitter.

        Raises:
            ConfigError: one of them is missing on this machine, or unusable.
        """
        split = None
        if self.language is not None:
            split = load_splitter(self.language, keep_newlines=self.keep_newlines)
        tokenizer = load_tokenizer(self.tokenizer, need_eod=self.append_eod)
        if difference := difference_from_file(tokenizer, self.tokenizer.tokenizer_model):
            raise ConfigError(difference)
        return tokenizer, split

    def encoder(self, loaded: Loaded, sample: Sequence[str], say: Callable[[str], None]) -> Encoder:
        """Build an encoder.

        Args:
            loaded: the result of `load`.
            sample: texts of the input, on which the engine is checked.
            say: receives lines about the engine, and about text that the tokenizer changes.

        Raises:
            ConfigError: the named engine is not available, or gives other ids.
        """
        from megatron.core.datasets.indexed_dataset import DType

        tokenizer, split = loaded
        if dropout_of(tokenizer):
            say(
                "warning: the tokenizer leaves out merges at random (dropout in tokenizer.json), "
                "so the same text has other ids each time; set it to null there"
            )
        engine = choose_engine(tokenizer, sample, self.engine, say)
        _warn_of_changes(tokenizer, sample, say)
        return Encoder(
            engine=engine,
            reference=MegatronEngine(tokenizer),
            keys=self.keys,
            split=split,
            eod=tokenizer.eod if self.append_eod else None,
            vocab_size=tokenizer.vocab_size,
            dtype=DType.optimal_dtype(tokenizer.vocab_size),
        )

    def digest(self, loaded: Loaded) -> str:
        """A hash that all machines must share: of the tokenizer's files and its ids of `PROBES`."""
        digest = hashlib.sha256()
        for file in tokenizer_files(self.tokenizer):
            digest.update(file.name.encode() + file.read_bytes())
        for text in PROBES:
            try:
                ids = repr(list(loaded[0].tokenize(text)))
            except Exception as error:  # the text has no ids; each library raises its own errors
                ids = type(error).__name__
            digest.update(ids.encode())
        return digest.hexdigest()


def tokenizer_files(flags: argparse.Namespace) -> list[Path]:
    """The files that the tokenizer flags name, and the files in folders that they name."""
    names = (flags.tokenizer_model, flags.vocab_file, flags.merge_file)
    paths = [Path(path) for path in names if path]
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    return sorted(file for file in files if file.is_file())


def _warn_of_changes(
    tokenizer: Tokenizer, sample: Sequence[str], say: Callable[[str], None]
) -> None:
    """Warn if the ids of a sample text decode to another text."""
    texts = [text[:ROUND_TRIP_LENGTH] for text in sample[:ROUND_TRIPS]]
    try:
        change = changed_text(tokenizer, texts)
    except ValueError:  # the text has no ids: an error will name its document
        return
    if change:
        say(f"warning: the tokenizer changes text, {change[0]!a} comes back as {change[1]!a}")
