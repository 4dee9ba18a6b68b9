"""Chooses the fastest engine that gives the ids of a Megatron tokenizer.

Inputs: a tokenizer that Megatron built, and texts of the input. Outputs: an engine.

Design notes:
- `gigatoken` (extra `fast`) caches the ids of words, and leaves texts for which its ids may differ
  to Megatron's tokenizer. `tokenizers` encodes many texts in one call, without the work of
  transformers for each text. `megatron` is the tokenizer itself.
- Every engine must give the ids of the tokenizer on a sample. This proves little, so `equality.py`
  compares whatever can differ.
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

SHOWN_STRINGS = 4
"""So many strings are named in a line."""

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
"""Texts on which tokenizers differ: spaces, numbers, contractions, scripts, control characters."""

MAKERS: dict[str, Callable[[Tokenizer], Engine]] = {
    "gigatoken": GigatokenEngine,
    "tokenizers": TokenizersEngine,
    "megatron": MegatronEngine,
}
"""Name -> constructor, the fastest first; `megatron` always works."""


def choose_engine(
    tokenizer: Tokenizer, sample: Sequence[str], name: str, say: Callable[[str], None]
) -> Engine:
    """Choose the engine.

    Args:
        tokenizer: the tokenizer that Megatron built.
        sample: texts of the input.
        name: name of an engine; `auto` for the first of `MAKERS` that gives the same ids.
        say: receives a line with the engine, and with the reasons against faster ones.

    Raises:
        ConfigError: the named engine gives other ids, or is not installed.
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
            _check_ids(engine, reference, texts)
        except Exception as error:  # each library raises its own errors
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


def _check_ids(engine: Engine, reference: Engine, texts: Sequence[str]) -> None:
    """Raise UnusableError if an engine gives other ids than the tokenizer."""
    ids, lengths = guarded(engine, texts)
    expected, expected_lengths = reference(texts)
    if numpy.array_equal(ids, expected) and numpy.array_equal(lengths, expected_lengths):
        return
    for text in texts:
        actual, right = engine([text])[0].tolist(), reference([text])[0].tolist()
        if actual != right:
            raise UnusableError(f"gives {actual[:8]} for {text[:40]!a}, not {right[:8]}")
    raise UnusableError("gives other ids for many texts at once")


def _exceptions(engine: Engine) -> list[str]:
    """A clause about the texts that an engine leaves to the tokenizer, if there are any."""
    if not isinstance(engine, GigatokenEngine) or not (strings := engine.doubtful_strings):
        return []
    shown = ", ".join(ascii(string[:20]) for string in strings[:SHOWN_STRINGS])
    omitted = f" or {len(strings) - SHOWN_STRINGS} more" if len(strings) > SHOWN_STRINGS else ""
    return [f"texts with {shown}{omitted} go to Megatron's tokenizer"]


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts that contain all added tokens, up to 20 in each."""
    try:
        added = backend_of(tokenizer).get_added_tokens_decoder().values()
    except UnusableError:
        return []
    return [" b".join(token.content for token in tokens) for tokens in batched(added, 20)]
