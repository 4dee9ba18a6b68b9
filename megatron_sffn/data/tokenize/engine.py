"""Engines that turn texts into ids: Megatron's tokenizer, and the `tokenizers` library below it.

Inputs: a tokenizer that Megatron built, and texts. Outputs: ids.

Design notes:
- No engine has threads of its own: the worker processes are the parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.tokenize.tokenizer import Tokenizer

Ids = NDArray[Any]
Lengths = NDArray[numpy.int64]


class Engine(Protocol):
    """Turns texts into ids."""

    name: str

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """All ids, one text after the other, and their number for each text."""


class UnusableError(Exception):
    """An engine that cannot stand for a tokenizer; the message says why."""


class MegatronEngine:
    """Megatron's tokenizer, text by text."""

    name = "megatron"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """See `Engine`."""
        return joined([self._tokenizer.tokenize(text) for text in texts])


class TokenizersEngine:
    """The `tokenizers.Tokenizer` below that of transformers, which is below Megatron's."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = backend_of(tokenizer)
        if dropout := dropout_of(tokenizer):
            raise UnusableError(f"cannot follow BPE dropout ({dropout:g})")
        self._special = tokenizer._tokenizer.include_special_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """See `Engine`."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=self._special)
        return joined([item.ids for item in encoded])


def guarded[Given, Made](call: Callable[[Given], Made], given: Given) -> Made:
    """The value of a call of a library in Rust, whose panics are no `Exception`."""
    try:
        return call(given)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"fails ({error})") from error


def backend_of(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` below a tokenizer of Megatron's.

    Raises:
        UnusableError: there is none, or a class of Python code computes the ids beside it.
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
    """Share of the merges that a tokenizer leaves out, at random and others each time."""
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    return getattr(getattr(backend, "model", None), "dropout", None) or 0.0


def joined(lists: Sequence[Sequence[int]]) -> tuple[Ids, Lengths]:
    """The ids of texts in one array, and their number for each text."""
    lengths = numpy.fromiter(map(len, lists), numpy.int64, len(lists))
    return numpy.fromiter(chain.from_iterable(lists), numpy.int64, int(lengths.sum())), lengths
