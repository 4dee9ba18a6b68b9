"""The fastest way to the ids of a Megatron tokenizer.

Inputs: a tokenizer that Megatron built, and texts of the input. Outputs: an engine that gives the
same ids.

Design notes:
- `gigatoken` (extra `fast`) looks up pieces of text that it has met before, and leaves texts that
  may come out otherwise to the tokenizer itself. `tokenizers` is called for many texts at once,
  without what transformers does for each. `megatron` is the tokenizer.
- That engines give the ids of the tokenizer on a sample is asked for as well, and proves little:
  what can differ is compared in `equality.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import batched

import numpy

from megatron_sffn.data.tokenize.engine import (
    Engine,
    MegatronEngine,
    TokenizersEngine,
    UnusableError,
    backend_of,
    guarded,
)
from megatron_sffn.data.tokenize.gigatoken_engine import GigatokenEngine
from megatron_sffn.data.tokenize.tokenizer import Tokenizer
from megatron_sffn.utils.errors import ConfigError

SHOWN = 4
"""Strings that are named."""

PROBES = [
    "",
    " ",
    "a",
    "  leading, double  and trailing  ",
    "tabs\tand\n\n\nnewlines\r\n \n  \n",
    "don't DON'T we'll I'M they'Ve l'été",
    "1 12 123 1234567890 3.14e-10 0x1F ½ ² Ⅻ ٣٤٥",
    "snake_case camelCase HTTPServer $%&*()[]{}<>|~^`@#!?;:",
    "Grüße, naïve, e\u0301, 日本語, 中文。한국어 עברית हिन्दी ภาษาไทย",
    "🦙👩‍👩‍👧‍👦🇩🇪 \u200b\u00a0\u2028\u3000\ufeff\u00ad",
    "\x00\x01\x1f\x7f\x85 \ud7ff\ue000\ufffd\U0010ffff",
    "x" * 300 + " " * 300 + "." * 300 + "\n" * 30,
]
"""Texts in which tokenizers differ: spaces, numbers, contractions, scripts, control characters."""

MAKERS: dict[str, Callable[[Tokenizer], Engine]] = {
    "gigatoken": GigatokenEngine,
    "tokenizers": TokenizersEngine,
    "megatron": MegatronEngine,
}
"""From the fastest to the one that is always there."""


def choose_engine(
    tokenizer: Tokenizer, sample: Sequence[str], name: str, say: Callable[[str], None]
) -> Engine:
    """The engine to use.

    Args:
        tokenizer: what Megatron built.
        sample: texts of the input.
        name: of the engine, or `auto`: the first of `MAKERS` that gives the ids of the tokenizer.
        say: told which engine it is, and why not a faster one.

    Raises:
        ConfigError: the engine that is named gives other ids, or is not there.
    """
    reference = MegatronEngine(tokenizer)
    texts = [*PROBES, *_added_tokens(tokenizer), *sample]
    reasons = []
    for candidate, make in MAKERS.items():
        if candidate == "megatron":
            break
        if name not in ("auto", candidate):
            continue
        try:
            engine = guarded(make, tokenizer)
            _prove(engine, reference, texts)
        except Exception as error:  # each library has its own
            reasons.append(f"{candidate} {error}")
            continue
        line = f"ids by {candidate}, which gave those of Megatron's tokenizer on {len(texts)} texts"
        say("; ".join([line, *_exceptions(engine), *reasons]))
        return engine
    if name not in ("auto", "megatron"):
        raise ConfigError(
            f"--engine {name} cannot stand for the tokenizer: it {reasons[0].partition(' ')[2]}; "
            "leave --engine out"
        )
    say("; ".join(["ids by Megatron's tokenizer", *reasons]))
    return reference


def _prove(engine: Engine, reference: Engine, texts: Sequence[str]) -> None:
    ids, lengths = guarded(engine, texts)
    expected, expected_lengths = reference(texts)
    if numpy.array_equal(ids, expected) and numpy.array_equal(lengths, expected_lengths):
        return
    for text in texts:
        found, right = engine([text])[0].tolist(), reference([text])[0].tolist()
        if found != right:
            raise UnusableError(f"gives {found[:8]} for {text[:40]!a}, not {right[:8]}")
    raise UnusableError("gives other ids for many texts at once")


def _exceptions(engine: Engine) -> list[str]:
    """Texts that an engine leaves to the tokenizer."""
    if not isinstance(engine, GigatokenEngine) or not (strings := engine.doubtful_strings):
        return []
    shown = ", ".join(ascii(string[:20]) for string in strings[:SHOWN])
    more = f" or {len(strings) - SHOWN} more" if len(strings) > SHOWN else ""
    return [f"texts with {shown}{more} go to Megatron's tokenizer"]


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts with all added tokens, some in each."""
    try:
        added = backend_of(tokenizer).get_added_tokens_decoder().values()
    except UnusableError:
        return []
    return [" b".join(token.content for token in tokens) for tokens in batched(added, 20)]
