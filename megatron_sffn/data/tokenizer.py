"""Megatron's tokenizers, built before anything else, with one sentence when that fails.

Enters: Megatron's tokenizer flags. Leaves: the tokenizer that Megatron builds from them.
"""

from __future__ import annotations

import argparse
import os
from typing import Protocol

from megatron_sffn.errors import ConfigError


class Tokenizer(Protocol):
    """What is needed of a tokenizer that Megatron built."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eod(self) -> int | None:
        """Id of the end of a document."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`."""


def load_tokenizer(args: argparse.Namespace, *, need_eod: bool = False) -> Tokenizer:
    """Build the tokenizer that the flags name.

    Args:
        args: with the flags of Megatron's `TokenizerConfig`; not changed.
        need_eod: refuse a tokenizer without an end-of-document token.

    Raises:
        ConfigError: no type is named, its files are missing or unusable, or it has no eod.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if args.tokenizer_type is None:
        raise ConfigError(
            "--tokenizer-type is not given and there is no default; for a folder made by "
            "tools/train_tokenizer.py use: --tokenizer-type HuggingFaceTokenizer "
            "--tokenizer-model DIR"
        )
    for flag, path in (
        ("--tokenizer-model", args.tokenizer_model),
        ("--vocab-file", args.vocab_file),
        ("--merge-file", args.merge_file),
    ):
        if path is not None and not os.path.exists(path) and _is_path(path):
            raise ConfigError(f"{flag} {path} does not exist; give an existing file or folder")
    # Padding the vocabulary concerns the model, and writes to the namespace.
    args = argparse.Namespace(**{**vars(args), "pad_vocab_size": False})
    chosen = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    try:
        tokenizer: Tokenizer = build_tokenizer(args)
        eod = tokenizer.eod if need_eod else 0
    except Exception as error:  # each tokenizer library has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{chosen} cannot be loaded ({reason}); check the tokenizer flags"
        ) from error
    if eod is None:
        raise ConfigError(f"{chosen} has no end-of-document token; leave out --append-eod")
    return tokenizer


def _is_path(name: str) -> bool:
    """Whether a name that does not exist was meant as a path, not as a model of the hub.

    Asking the hub takes a minute to fail on a machine without a network.
    """
    parent = os.path.dirname(name)
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isdir(parent)
