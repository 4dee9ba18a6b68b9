"""Bytes of text per token of a data set, which turn a loss into bits per byte.

Inputs: the flags of a run. Outputs: its losses in bits per byte.

Design notes: bits per byte are comparable between tokenizers, a loss per token is not. The ratio is
that of the beginning of the data set, decoded.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import numpy

from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer

DECODED_TOKENS = 1_000_000
"""Most tokens of a data set that are decoded."""
_BYTES_PER_TOKEN: dict[tuple[str, str], float] = {}
"""Prefix of a data set and tokenizer -> its ratio, which is measured once."""


def bits_per_byte(loss: float, prefix: str, args: Namespace) -> float | None:
    """A loss per token as bits per byte of text; None if the ids stand for no text.

    Args:
        loss: nats per token.
        prefix: of the data set of the loss.
        args: Megatron's namespace, with the tokenizer.
    """
    if args.tokenizer_type == "NullTokenizer":
        return None
    key = prefix, str(args.tokenizer_model)
    if key not in _BYTES_PER_TOKEN:
        _BYTES_PER_TOKEN[key] = _bytes_per_token(prefix, args)
    return loss / math.log(2) / _BYTES_PER_TOKEN[key]


def validation_prefixes(args: Namespace) -> list[str]:
    """Prefixes of the data sets that a run is evaluated on."""
    # Megatron's lists may have weights between the prefixes.
    words = map(str, args.valid_data_path or args.data_path or [])
    return [word for word in words if Path(f"{word}.idx").exists()]


def _bytes_per_token(prefix: str, args: Namespace) -> float:
    """Bytes of UTF-8 per token at the beginning of a data set."""
    index = open_index(prefix)
    ids = numpy.memmap(index.bin, dtype=index.dtype, mode="r")[:DECODED_TOKENS]
    text = load_tokenizer(args).detokenize(ids.tolist(), skip_special_tokens=True)
    return len(text.encode()) / len(ids)
