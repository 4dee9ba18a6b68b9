"""Engines that encode texts: Megatron's tokenizer, and the `tokenizers` library that it wraps.

Design notes:
- No engine has threads of its own: the worker processes are the parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol, override

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.tokenize.tokenizer import Tokenizer

Ids = NDArray[Any]
Lengths = NDArray[numpy.int64]


class Engine(Protocol):
    """Encodes texts."""

    name: str

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts, concatenated, and the number of ids of each text."""


class UnusableError(Exception):
    """An engine cannot replace a tokenizer; the message, a verb phrase, says why."""


class MegatronEngine(Engine):
    """Megatron's tokenizer, which encodes text by text."""

    name = "megatron"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @override
    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return joined([self._tokenizer.tokenize(text) for text in texts])


class TokenizersEngine(Engine):
    """The `tokenizers.Tokenizer` that transformers wraps, whose tokenizer Megatron wraps."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = backend_of(tokenizer)
        if dropout := dropout_of(tokenizer):
            raise UnusableError(f"cannot follow BPE dropout ({dropout:g})")
        self._special = tokenizer._tokenizer.include_special_tokens

    @override
    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=self._special)
        return joined([item.ids for item in encoded])


def guarded[Argument, Result](call: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call a library written in Rust: a panic, which is no `Exception`, becomes a RuntimeError."""
    try:
        return call(argument)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"fails ({error})") from error


def backend_of(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` that a tokenizer of Megatron's wraps.

    Raises:
        UnusableError: there is none, or Python code of a subclass also determines the ids.
    """
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    if (backend := getattr(inner, "backend_tokenizer", None)) is None:
        raise UnusableError("needs a fast tokenizer of transformers")
    from transformers import PreTrainedTokenizerFast

    for method in ("__call__", "_encode_plus", "tokenize", "convert_tokens_to_ids"):
        if getattr(type(inner), method) is not getattr(PreTrainedTokenizerFast, method):
            raise UnusableError(f"lacks the code of {type(inner).__name__}.{method}")
    return backend


def dropout_of(tokenizer: Tokenizer) -> float:
    """BPE dropout: the share of merges that the tokenizer skips at random in each call."""
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    return getattr(getattr(backend, "model", None), "dropout", None) or 0.0


def joined(lists: Sequence[Sequence[int]]) -> tuple[Ids, Lengths]:
    """Concatenate the ids of texts; returns them and the number of ids of each text."""
    lengths = numpy.fromiter(map(len, lists), numpy.int64, len(lists))
    return numpy.fromiter(chain.from_iterable(lists), numpy.int64, int(lengths.sum())), lengths
