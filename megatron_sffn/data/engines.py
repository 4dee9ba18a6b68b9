"""Ways to the ids of a Megatron tokenizer: the fastest that gives the same ones.

Enters: a tokenizer that Megatron built, and texts of the input. Leaves: an engine, proved equal to
it on these texts and on `PROBES`.

Choices
- `gigatoken` (extra `fast`) looks up pieces of text that it has met before. `tokenizers` is called
  for many texts at once, without what transformers does for each. `megatron` is the tokenizer.
- gigatoken never forgets a piece. When its process has grown by `GROWTH_BYTES` it is loaded anew,
  which takes 40 ms.
- No engine has threads of its own: the workers are the parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, Protocol

import numpy
import psutil
from numpy.typing import NDArray

from megatron_sffn.data.tokenizer import Tokenizer
from megatron_sffn.errors import ConfigError

GROWTH_BYTES = 512 << 20
SPECIAL_TOKENS = 300
"""Of a tokenizer that engines are compared on; more have no other way to go wrong."""
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
        return _join([self._tokenizer.tokenize(text) for text in texts])


class TokenizersEngine:
    """The `tokenizers.Tokenizer` below that of transformers, which is below Megatron's."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = _fast(tokenizer)
        self._special = tokenizer._tokenizer.include_special_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """See `Engine`."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=self._special)
        return _join([item.ids for item in encoded])


class GigatokenEngine:
    """gigatoken's byte-level BPE, or its SentencePiece BPE."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from gigatoken import Tokenizer as Gigatoken
        except ImportError as error:
            raise UnusableError("is not installed (pip install gigatoken)") from error
        self._load: Callable[[], Any]
        if tokenizer.library == "sentencepiece":
            self._load = lambda: Gigatoken.from_sentencepiece(tokenizer.path).backend
        else:
            content = _fast(tokenizer).to_str()
            self._load = lambda: Gigatoken.from_json(content).backend
        self._process = psutil.Process()
        self._renew()
        self._before, self._after = self._surroundings(tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """See `Engine`."""
        if self._resident() > self._limit:
            self._renew()
        layout = self._backend.encode_batch(texts, parallel=False).layout
        return self._surround(
            numpy.asarray(layout.content.data), numpy.asarray(layout.offsets.data)
        )

    def _renew(self) -> None:
        self._backend: Any = None  # frees the former one's memory before there is another
        self._backend = self._load()
        self._limit = self._resident() + GROWTH_BYTES

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _surroundings(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind the ids of every text."""
        whole, inner = list(tokenizer.tokenize("a")), self._backend.encode("a").tolist()
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        raise UnusableError(f"gives {inner} for 'a', not {whole}")

    def _surround(self, ids: Ids, offsets: Lengths) -> tuple[Ids, Lengths]:
        lengths = numpy.diff(offsets)
        added = self._before + self._after
        if not added:
            return ids, lengths
        starts, ends = [offsets[:-1]] * len(self._before), [offsets[1:]] * len(self._after)
        places = numpy.column_stack([*starts, *ends]).ravel()
        values = numpy.tile(numpy.array(added, ids.dtype), len(lengths))
        return numpy.insert(ids, places, values), lengths + len(added)


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
    texts = [*PROBES, *_special_tokens(tokenizer), *sample]
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
        say("; ".join([line, *reasons]))
        return engine
    if name not in ("auto", "megatron"):
        raise ConfigError(
            f"--engine {name} cannot stand for the tokenizer: it {reasons[0].partition(' ')[2]}; "
            "leave --engine out"
        )
    say("; ".join(["ids by Megatron's tokenizer", *reasons]))
    return reference


def guarded[Given, Made](call: Callable[[Given], Made], given: Given) -> Made:
    """The value of a call of a library in Rust, whose panics are no `Exception`."""
    try:
        return call(given)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"fails ({error})") from error


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


def _fast(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` below a tokenizer of Megatron's."""
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    if (backend := getattr(inner, "backend_tokenizer", None)) is None:
        raise UnusableError("needs a fast tokenizer of transformers")
    return backend


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    try:
        added = islice(_fast(tokenizer).get_added_tokens_decoder().values(), SPECIAL_TOKENS)
        return [f"a {token.content} b{token.content}" for token in added]
    except UnusableError:
        return []


def _join(lists: Sequence[Sequence[int]]) -> tuple[Ids, Lengths]:
    lengths = numpy.fromiter(map(len, lists), numpy.int64, len(lists))
    return numpy.fromiter(chain.from_iterable(lists), numpy.int64, int(lengths.sum())), lengths
