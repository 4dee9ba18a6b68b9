"""The engine of the library gigatoken (extra `fast`), which caches the ids of words.

Inputs: a tokenizer that Megatron built, and texts. Outputs: the ids of that tokenizer.

Design notes:
- gigatoken encodes only texts for which its ids are known to be the same (`equality.py`);
  Megatron's tokenizer encodes the other texts.
- Pre-tokenizers and normalizers are compared with a vocabulary made for this purpose, in which
  every split beside a character changes the ids. With a real vocabulary most splits do not change
  them, unless a word has the one merge that crosses the split.
- gigatoken never evicts a word from its cache. When its process has grown by `GROWTH_BYTES`, the
  library is loaded anew, which takes 40 ms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, override

import numpy
import psutil

from megatron_sffn.data.tokenize.engine import (
    Engine,
    Ids,
    Lengths,
    MegatronEngine,
    TokenizersEngine,
    UnusableError,
    backend_of,
    guarded,
    joined,
)
from megatron_sffn.data.tokenize.equality import Equality, Pair, differing_strings, replace_texts
from megatron_sffn.data.tokenize.tokenizer import Tokenizer

GROWTH_BYTES = 512 << 20
NEIGHBOURS = b" \n\r\t'.aAsS1-"
"""Bytes beside which every split changes the ids."""


class GigatokenEngine(Engine):
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
            content = backend_of(tokenizer).to_str()
            self._load = lambda: Gigatoken.from_json(content).backend
        self._reference = MegatronEngine(tokenizer)
        self._process = psutil.Process()
        self._renew()
        self._before, self._after = self._surroundings(tokenizer)
        self._equality = self._compare(tokenizer)

    @property
    def doubtful_strings(self) -> list[str]:
        """Megatron's tokenizer encodes the texts that contain one of these strings."""
        return self._equality.strings

    @override
    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        ids, lengths = self._encode(texts)
        # After the call: gigatoken makes Python keep the UTF-8 of each text, which is copied here.
        contents = [text.encode("utf-8", "surrogatepass") for text in texts]
        if not (doubtful := self._equality.doubtful(contents)):
            return ids, lengths
        right = self._reference([texts[number] for number in doubtful])
        return replace_texts((ids, lengths), right, doubtful)

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        if self._resident() > self._limit:
            self._renew()
        return self._surround(*_encode(self._backend, texts))

    def _renew(self) -> None:
        self._backend: Any = None  # free the memory of the former backend first
        self._backend = self._load()
        self._limit = self._resident() + GROWTH_BYTES

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _compare(self, tokenizer: Tokenizer) -> Equality:
        """Compare everything that can be compared before there is a text."""
        if tokenizer.library == "sentencepiece":
            tokens = Pair(self._reference, self._encode)
            strings = _sentence_piece_strings(tokenizer, tokens)
            return Equality(tokens, normalizes=False, strings=strings)
        # Faster than Megatron's tokenizer, which encodes text by text.
        tokens = Pair(TokenizersEngine(tokenizer), self._encode)
        content = json.loads(backend_of(tokenizer).to_str())
        _refuse_ignored(content)
        added = content["added_tokens"]
        strings = {token["content"] for token in added if token["single_word"]}
        matched = [token["content"] for token in added if token["content"] not in strings]
        model = content["model"]
        if model["byte_fallback"]:
            matched += [f"<0x{byte:02X}>" for byte in range(256)]
            strings.update(differing_strings(tokens, matched))
            return Equality(tokens, normalizes=False, strings=strings)
        strings.update(differing_strings(tokens, matched))
        normalizes = content["normalizer"] is not None
        # Without merges a split does not change the ids.
        words = _pre_tokenizers(content) if model["merges"] else tokens
        return Equality(words, normalizes=normalizes, strings=strings)

    def _surroundings(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after the ids of every text."""
        expected, inner = list(tokenizer.tokenize("a")), self._backend.encode("a").tolist()
        for start in range(len(expected) - len(inner) + 1):
            if expected[start : start + len(inner)] == inner:
                return expected[:start], expected[start + len(inner) :]
        raise UnusableError(f"gives {inner} for 'a', not {expected}")

    def _surround(self, ids: Ids, lengths: Lengths) -> tuple[Ids, Lengths]:
        added = self._before + self._after
        if not added:
            return ids, lengths
        ends = lengths.cumsum()
        starts = ends - lengths
        columns = [starts] * len(self._before) + [ends] * len(self._after)
        positions = numpy.column_stack(columns).ravel()
        values = numpy.tile(numpy.array(added, ids.dtype), len(lengths))
        return numpy.insert(ids, positions, values), lengths + len(added)


def _encode(backend: Any, texts: Sequence[str]) -> tuple[Ids, Lengths]:
    layout = backend.encode_batch(texts, parallel=False).layout
    return numpy.asarray(layout.content.data), numpy.diff(numpy.asarray(layout.offsets.data))


def _refuse_ignored(content: dict[str, Any]) -> None:
    """Refuse settings of a `tokenizer.json` that gigatoken ignores."""
    model = content["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnusableError(f"ignores the {name} {model[name]!r} of the model")
    if "Precompiled" in json.dumps(content["normalizer"]):
        raise UnusableError("normalizes graphemes in its own way (normalizer Precompiled)")


def _pre_tokenizers(content: dict[str, Any]) -> Pair:
    """Normalizer and pre-tokenizer, with a vocabulary in which every split changes the ids."""
    from gigatoken import Tokenizer as Gigatoken
    from tokenizers import Tokenizer as Backend

    removed_sections = dict.fromkeys(("post_processor", "truncation", "padding"))
    text = json.dumps(
        {**content, **removed_sections, "added_tokens": [], "model": _split_showing_model()}
    )
    backend = Backend.from_str(text)

    def trusted(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return joined([item.ids for item in encoded])

    return Pair(trusted, partial(_encode, guarded(Gigatoken.from_json, text).backend))


def _split_showing_model() -> dict[str, Any]:
    """A byte-level BPE that merges every pair of bytes between which a split is possible."""
    letters = _letters_of_bytes()
    lead_bytes, continuation_bytes = range(0xC2, 0xF5), range(0x80, 0xC0)
    neighbour_sets = (
        (NEIGHBOURS, lead_bytes),
        (continuation_bytes, NEIGHBOURS),
        (continuation_bytes, lead_bytes),
        (NEIGHBOURS, NEIGHBOURS),
    )
    pairs = [
        (letters[left], letters[right]) for sets in neighbour_sets for left, right in product(*sets)
    ]
    vocabulary = dict.fromkeys([*letters, *("".join(pair) for pair in pairs)])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {piece: number for number, piece in enumerate(vocabulary)},
        "merges": [list(pair) for pair in pairs],
    }


def _letters_of_bytes() -> list[str]:
    """GPT-2's letter for each byte: the byte itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


def _sentence_piece_strings(tokenizer: Tokenizer, tokens: Pair) -> set[str]:
    """Strings that SentencePiece and gigatoken may encode differently: pieces that are not text.

    Raises:
        UnusableError: the model normalizes text.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    model = proto.FromString(Path(tokenizer.path).read_bytes())
    if model.normalizer_spec.precompiled_charsmap:
        name = model.normalizer_spec.name or "user_defined"
        raise UnusableError(f"normalizes text in its own way (the model's rule is {name})")
    if not tokenizer._tokenizer.ignore_extra_whitespaces:
        raise UnusableError("ignores extra white space")
    kind = proto.SentencePiece
    not_text = {kind.CONTROL, kind.UNKNOWN, kind.UNUSED}
    strings = {piece.piece for piece in model.pieces if piece.type in not_text}
    strings.update(tokenizer._tokenizer.special_token_to_id)
    matched = {kind.USER_DEFINED, kind.BYTE}
    pieces = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type in matched]
    strings.update(differing_strings(tokens, [piece for piece in pieces if piece not in strings]))
    return strings
