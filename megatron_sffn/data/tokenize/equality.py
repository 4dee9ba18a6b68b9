"""Finds the texts for which two tokenizers of one model may give different ids.

Inputs: a trusted and a faster function from texts to ids, and the strings that they may treat
differently. Outputs: for any text, an answer to whether all of it was compared and is equal.

Design notes:
- A sample of the input proves nothing about the rest. The possible differences are finite: the
  treatment of each character (its class in the pattern of the pre-tokenizer, its normal form, its
  order among combining marks), and of each string that is searched for in the raw text (added,
  control, unknown, user-defined and byte tokens).
- A character is compared when it first occurs in a text: a corpus has thousands of different
  characters, Unicode a million. So the result does not depend on the version of the Unicode tables.
- The check is one pass over a text: `bytes.find` or a regular expression for the strings, and a
  table for the characters beyond ASCII.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from random import Random

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.tokenize.engine import Ids, Lengths, UnusableError, guarded

Encode = Callable[[Sequence[str]], tuple[Ids, Lengths]]

EQUAL, UNTESTED, DIFFERENT = 0, 1, 2
"""States of a character."""
ASCII = bytes(range(128))
SLICE = 1 << 20
"""Characters that are looked up in the table at once."""

FEW_STRINGS = 4
"""Up to so many strings are searched one by one, which is faster than one pattern."""

ALPHABET = " \n\r\t'.asA1é日\u0301🦙"
"""One character of each class in the patterns of pre-tokenizers."""
WHITE_SPACE = " \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000"


class Pair:
    """A trusted tokenizer and a faster one.

    Args:
        trusted: gives the right ids.
        faster: gives the ids to compare.
    """

    def __init__(self, trusted: Encode, faster: Encode) -> None:
        self._trusted, self._faster = trusted, faster

    def differing(self, texts: Sequence[str]) -> list[str]:
        """The texts for which the ids differ."""
        if not texts:
            return []
        right, candidate = self._trusted(texts), guarded(self._faster, texts)
        if all(map(numpy.array_equal, right, candidate)):
            return []
        ids = zip(texts, _by_text(*right), _by_text(*candidate), strict=True)
        return [text for text, expected, actual in ids if not numpy.array_equal(expected, actual)]


def _by_text(ids: Ids, lengths: Lengths) -> list[Ids]:
    return numpy.split(ids, numpy.cumsum(lengths)[:-1])


class Equality:
    """The characters and strings that two tokenizers treat in the same way.

    Args:
        words: the pair, with ids that show how texts are normalized and split into words.
        normalizes: True if texts are first normalized (Unicode).
        strings: strings that the two treat differently, or may.

    Raises:
        UnusableError: the two differ on text of everyday characters.
    """

    def __init__(self, words: Pair, *, normalizes: bool, strings: Iterable[str]) -> None:
        self._words, self._normalizes = words, normalizes
        self._states = numpy.full(0x110000, UNTESTED, numpy.uint8)
        self.strings = sorted(strings)
        if differing := words.differing(
            [self._without_strings(text) for text in _everyday_texts()]
        ):
            raise UnusableError(f"cuts text into other words, such as {differing[0]!a}")
        # ASCII characters are not looked up in the table, so those that differ become strings.
        self._test(list(range(128)))
        ascii_states = self._states[:128]
        control = {chr(code) for code in numpy.flatnonzero(ascii_states == DIFFERENT)}
        if readable := sorted(char for char in control if char in WHITE_SPACE or char >= " "):
            raise UnusableError(f"treats the character {readable[0]!a} in another way")
        ascii_states[:] = EQUAL
        self.strings = sorted({*self.strings, *control})
        self._strings = [string.encode() for string in self.strings]
        self._pattern: re.Pattern[bytes] | None = None
        if len(self.strings) > FEW_STRINGS:
            # The order does not matter: any match is enough.
            self._pattern = re.compile(b"|".join(map(re.escape, self._strings)))

    def doubtful(self, contents: Sequence[bytes]) -> list[int]:
        """Numbers of the texts for which the ids differ, or may.

        Args:
            contents: texts in UTF-8.
        """
        numbers = {number for number, text in enumerate(contents) if self._has_string(text)}
        non_ascii = [number for number, text in enumerate(contents) if not text.isascii()]
        if non_ascii and not self._are_equal([contents[number] for number in non_ascii]):
            numbers.update(
                number for number in non_ascii if not self._are_equal([contents[number]])
            )
        return sorted(numbers)

    def _has_string(self, content: bytes) -> bool:
        if self._pattern is not None:
            return self._pattern.search(content) is not None
        return any(string in content for string in self._strings)

    def _are_equal(self, contents: Sequence[bytes]) -> bool:
        """True if the characters beyond ASCII are treated equally; compares new characters."""
        # Most characters of most texts are ASCII, which are known to be equal.
        non_ascii = b"".join(content.translate(None, ASCII) for content in contents)
        text = non_ascii.decode("utf-8", "surrogatepass")
        for start in range(0, len(text), SLICE):
            piece = text[start : start + SLICE].encode("utf-32-le", "surrogatepass")
            codes = numpy.frombuffer(piece, numpy.uint32)
            states = self._states[codes]
            if not states.any():
                continue
            self._test(numpy.unique(codes[states == UNTESTED]).tolist())
            if self._states[codes].any():
                return False
        return True

    def _without_strings(self, text: str) -> str:
        for string in self.strings:
            text = text.replace(string, " ")
        return text

    def _test(self, codes: Sequence[int]) -> None:
        self._states[codes] = DIFFERENT
        texts = {}
        for code in codes:
            context = _contexts(chr(code), normalizes=self._normalizes)
            texts[self._without_strings(context)] = code
        self._states[list(texts.values())] = EQUAL
        for text in self._words.differing(list(texts)):
            self._states[texts[text]] = DIFFERENT
        if self._normalizes:
            # Python's tables lack unassigned characters, and so the characters that compose them.
            unknown = [code for code in texts.values() if unicodedata.category(chr(code)) == "Cn"]
            self._states[unknown] = DIFFERENT


def differing_strings(tokens: Pair, strings: Sequence[str]) -> list[str]:
    """The token strings that two tokenizers treat differently.

    Args:
        tokens: the pair.
        strings: strings that the tokenizers search for in the raw text.

    Raises:
        UnusableError: the two treat each string equally, but not several of them together.
    """
    spaces = WHITE_SPACE
    texts = {}
    for string in strings:
        forms = dict.fromkeys((string, unicodedata.normalize("NFD", string)))
        for form in forms:
            in_context = (
                f"{form}a{form}b {form} c{spaces}{form}{spaces}\n{form}1{form}{form}.{form}"
            )
            texts[f"a{in_context}"] = texts[in_context] = texts[form] = string
    different = sorted({texts[text] for text in tokens.differing(list(texts))})
    equal_strings = [string for string in strings if string not in set(different)]
    if equal_strings:
        # Compare tokens that overlap or are adjacent.
        random = Random(0)
        mixed = []
        for _ in range(min(2 * len(equal_strings), 2000)):
            tokens_in_row = random.choices(equal_strings, k=4)
            tokens_in_row[1] = tokens_in_row[1][: random.randrange(len(tokens_in_row[1]) + 1)]
            mixed.append("".join(tokens_in_row))
        for text in tokens.differing(mixed):
            raise UnusableError(f"differs where added tokens meet, as in {text[:60]!a}")
    return different


def _everyday_texts() -> list[str]:
    """All texts of one to three characters of `ALPHABET`, and random long ones."""
    short = ["".join(text) for size in (1, 2, 3) for text in product(ALPHABET, repeat=size)]
    random = Random(0)
    return [*short, *("".join(random.choices(ALPHABET, k=size)) for size in range(200))]


def _contexts(char: str, *, normalizes: bool) -> str:
    """A text whose ids depend on the class of a character in the pattern of a pre-tokenizer.

    With `normalizes` they also depend on its order among combining marks, and on its compositions.
    """
    between_neighbours = "".join(
        f"{neighbour}{char}{neighbour}" for neighbour in ("a", " A", " 1", " .", "\n", "\u00a0")
    )
    text = f"{char}{between_neighbours} '{char}s {char}'s {char}{char} {char} \r{char}\t{char}"
    if normalizes:
        bases = "".join(f"{base}{char} " for base in _bases()[char])
        marks = f"a\u0345{char}\u0334{char}\u0316\u0301{char}\u0327 \u1100{char}\uac00{char}"
        text = f"{text}{marks} {bases}{char}"
    return text


@cache
def _bases() -> defaultdict[str, str]:
    """Combining character -> the base characters with which it composes."""
    bases: defaultdict[str, str] = defaultdict(str)
    for code in [*range(0x3100), *range(0x10000, 0x1E000)]:
        decomposition = unicodedata.decomposition(chr(code)).split()
        if len(decomposition) == 2 and not decomposition[0].startswith("<"):
            base, mark = (chr(int(code_point, 16)) for code_point in decomposition)
            bases[mark] += base
    return bases


def replace_texts(
    encoded: tuple[Ids, Lengths], replacements: tuple[Ids, Lengths], numbers: Sequence[int]
) -> tuple[Ids, Lengths]:
    """Replace the ids of some texts.

    Args:
        encoded: ids and lengths of all texts.
        replacements: ids and lengths of the texts to replace.
        numbers: numbers of the texts to replace.
    """
    ids, lengths = encoded
    is_replaced: NDArray[numpy.bool_] = numpy.zeros(len(lengths), numpy.bool_)
    is_replaced[list(numbers)] = True
    new_lengths = lengths.copy()
    new_lengths[is_replaced] = replacements[1]
    is_new = numpy.repeat(is_replaced, new_lengths)
    new_ids = numpy.empty(len(is_new), numpy.int64)
    new_ids[is_new] = replacements[0]
    new_ids[~is_new] = ids[~numpy.repeat(is_replaced, lengths)]
    return new_ids, new_lengths
