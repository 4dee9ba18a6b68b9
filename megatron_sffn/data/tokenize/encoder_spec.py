"""What makes the encoder of a run: flags, from which another machine makes the same one.

Enters: the flags of `tools/preprocess_data.py` that determine ids. Leaves: an `Encoder`.
Choice: an encoder holds what libraries have loaded, and cannot travel; its spec can.
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
from megatron_sffn.data.tokenize.tokenizer import Tokenizer, changed_text, load_tokenizer, rebuilt
from megatron_sffn.utils.errors import ConfigError

ROUND_TRIPS, ROUND_TRIP_LENGTH = 25, 2000

Loaded = tuple[Tokenizer, Splitter | None]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How texts become ids.

    Args:
        tokenizer: Megatron's flags of the tokenizer.
        keys: of the texts in a document.
        language: of the sentences that texts are cut into; None: they are not.
        keep_newlines: white space between sentences is kept.
        append_eod: end every document with the id for that.
        engine: what computes the ids, or `auto`.
    """

    tokenizer: argparse.Namespace
    keys: tuple[str, ...]
    language: str | None
    keep_newlines: bool
    append_eod: bool
    engine: str

    def load(self) -> Loaded:
        """The tokenizer, and what cuts texts.

        Raises:
            ConfigError: one of them is missing on this machine, or unusable.
        """
        split = None
        if self.language is not None:
            split = load_splitter(self.language, keep_newlines=self.keep_newlines)
        tokenizer = load_tokenizer(self.tokenizer, need_eod=self.append_eod)
        if difference := rebuilt(tokenizer, self.tokenizer.tokenizer_model):
            raise ConfigError(difference)
        return tokenizer, split

    def encoder(self, loaded: Loaded, sample: Sequence[str], say: Callable[[str], None]) -> Encoder:
        """An encoder.

        Args:
            loaded: what `load` returned.
            sample: texts of the input, on which its engine is proved.
            say: told which engine it is, and what the tokenizer does not give back.

        Raises:
            ConfigError: the engine that is named cannot be.
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
        """What machines must have in common: the tokenizer's files, and its ids of some texts."""
        digest = hashlib.sha256()
        for file in tokenizer_files(self.tokenizer):
            digest.update(file.name.encode() + file.read_bytes())
        for text in PROBES:
            try:
                ids = repr(list(loaded[0].tokenize(text)))
            except Exception as error:  # a text that has no ids; each library has its own errors
                ids = type(error).__name__
            digest.update(ids.encode())
        return digest.hexdigest()


def tokenizer_files(flags: argparse.Namespace) -> list[Path]:
    """The files that the flags of a tokenizer name, and those in folders that they name."""
    named = (flags.tokenizer_model, flags.vocab_file, flags.merge_file)
    paths = [Path(path) for path in named if path]
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    return sorted(file for file in files if file.is_file())


def _warn_of_changes(
    tokenizer: Tokenizer, sample: Sequence[str], say: Callable[[str], None]
) -> None:
    """Say that the ids of a text do not give it back, if they do not."""
    texts = [text[:ROUND_TRIP_LENGTH] for text in sample[:ROUND_TRIPS]]
    try:
        change = changed_text(tokenizer, texts)
    except ValueError:  # a text that has no ids: its document will be named
        return
    if change:
        say(f"warning: the tokenizer changes text, {change[0]!a} comes back as {change[1]!a}")
