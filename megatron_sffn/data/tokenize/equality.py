"""Texts on which two tokenizers are known to give the same ids.

Inputs: two functions from texts to ids, a trusted one and a faster one, and the strings that one of
them may treat in its own way. Outputs: for any text, whether all that is in it was compared.

Design notes:
- A sample of the input proves nothing about the rest. What two tokenizers of one model can differ
  in is finite: what they do with each character (its class in the pattern of the pre-tokenizer, its
  normal form, its order among combining marks), and with each string that they look for in the text
  before anything else (added, control, unknown, user-defined and byte tokens).
- Characters are compared when a text first has them: a corpus has some thousands, Unicode a
  million. So no version of the Unicode tables has to be known.
- Looking costs one pass over a text: `bytes.find` or a regular expression for the strings, a table
  for the characters that are not ASCII.
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

ALIKE, UNTESTED, DIFFERENT = 0, 1, 2
ASCII = bytes(range(128))
SLICE = 1 << 20
"""Characters that are looked up in the table at a time."""

FEW_STRINGS = 4
"""Up to so many strings are looked for one after the other, which is faster than one pattern."""

ALPHABET = " \n\r\t'.asA1é日\u0301🦙"
"""A character of each class that the patterns of pre-tokenizers know."""
WHITE_SPACE = " \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000"


class Pair:
    """A trusted tokenizer and a faster one.

    Args:
        trusted: gives the right ids.
        faster: is compared with it.
    """

    def __init__(self, trusted: Encode, faster: Encode) -> None:
        self._trusted, self._faster = trusted, faster

    def differing(self, texts: Sequence[str]) -> list[str]:
        """Those of some texts for which the ids differ."""
        if not texts:
            return []
        right, candidate = self._trusted(texts), guarded(self._faster, texts)
        if all(map(numpy.array_equal, right, candidate)):
            return []
        pairs = zip(texts, _by_text(*right), _by_text(*candidate), strict=True)
        return [text for text, one, other in pairs if not numpy.array_equal(one, other)]


def _by_text(ids: Ids, lengths: Lengths) -> list[Ids]:
    return numpy.split(ids, numpy.cumsum(lengths)[:-1])


class Equality:
    """What is known of a pair, and what is not.

    Args:
        words: the pair whose ids show how texts are cut into words and normalized.
        normalizes: whether texts are brought into a normal form of Unicode first.
        strings: with which the two do not do the same, or are not known to.

    Raises:
        UnusableError: the two differ on text of everyday characters.
    """

    def __init__(self, words: Pair, *, normalizes: bool, strings: Iterable[str]) -> None:
        self._words, self._normalizes = words, normalizes
        self._states = numpy.full(0x110000, UNTESTED, numpy.uint8)
        self.strings = sorted(strings)
        if differing := words.differing([self._without_strings(one) for one in _everyday_texts()]):
            raise UnusableError(f"cuts text into other words, such as {differing[0]!a}")
        # Texts of ASCII characters are not looked up in the table: what differs becomes a string.
        self._test(list(range(128)))
        ascii_states = self._states[:128]
        control = {chr(code) for code in numpy.flatnonzero(ascii_states == DIFFERENT)}
        if readable := sorted(char for char in control if char in WHITE_SPACE or char >= " "):
            raise UnusableError(f"treats the character {readable[0]!a} in another way")
        ascii_states[:] = ALIKE
        self.strings = sorted({*self.strings, *control})
        self._strings = [string.encode() for string in self.strings]
        self._pattern: re.Pattern[bytes] | None = None
        if len(self.strings) > FEW_STRINGS:
            # The longest first is not needed: any match is enough.
            self._pattern = re.compile(b"|".join(map(re.escape, self._strings)))

    def doubtful(self, contents: Sequence[bytes]) -> list[int]:
        """Numbers of the texts that hold something on which the two differ, or may.

        Args:
            contents: texts in UTF-8.
        """
        numbers = {number for number, one in enumerate(contents) if self._holds_string(one)}
        others = [number for number, one in enumerate(contents) if not one.isascii()]
        if others and not self._are_alike([contents[number] for number in others]):
            numbers.update(number for number in others if not self._are_alike([contents[number]]))
        return sorted(numbers)

    def _holds_string(self, content: bytes) -> bool:
        if self._pattern is not None:
            return self._pattern.search(content) is not None
        return any(string in content for string in self._strings)

    def _are_alike(self, contents: Sequence[bytes]) -> bool:
        # Most characters of most texts are ASCII, which are the same: they are taken out first.
        rest = b"".join(content.translate(None, ASCII) for content in contents)
        text = rest.decode("utf-8", "surrogatepass")
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
        self._states[list(texts.values())] = ALIKE
        for text in self._words.differing(list(texts)):
            self._states[texts[text]] = DIFFERENT
        if self._normalizes:
            # A character that Python does not know may be composed of others that it does not know.
            unknown = [code for code in texts.values() if unicodedata.category(chr(code)) == "Cn"]
            self._states[unknown] = DIFFERENT


def differing_strings(tokens: Pair, strings: Sequence[str]) -> list[str]:
    """Strings that tokenizers look for in the text, and with which two do not do the same.

    Args:
        tokens: the pair itself.
        strings: contents of tokens.

    Raises:
        UnusableError: they do the same with each, but not with several.
    """
    spaces = WHITE_SPACE
    texts = {}
    for string in strings:
        forms = dict.fromkeys((string, unicodedata.normalize("NFD", string)))
        for form in forms:
            once = f"{form}a{form}b {form} c{spaces}{form}{spaces}\n{form}1{form}{form}.{form}"
            texts[f"a{once}"] = texts[once] = texts[form] = string
    different = sorted({texts[text] for text in tokens.differing(list(texts))})
    rest = [string for string in strings if string not in set(different)]
    if rest:
        # Tokens that overlap, or lie beside each other.
        random = Random(0)
        mixed = []
        for _ in range(min(2 * len(rest), 2000)):
            several = random.choices(rest, k=4)
            several[1] = several[1][: random.randrange(len(several[1]) + 1)]
            mixed.append("".join(several))
        for text in tokens.differing(mixed):
            raise UnusableError(f"differs where added tokens meet, as in {text[:60]!a}")
    return different


def _everyday_texts() -> list[str]:
    """Short texts of every order of three characters, and long ones by chance."""
    short = ["".join(text) for size in (1, 2, 3) for text in product(ALPHABET, repeat=size)]
    random = Random(0)
    return [*short, *("".join(random.choices(ALPHABET, k=size)) for size in range(200))]


def _contexts(char: str, *, normalizes: bool) -> str:
    """A text that shows to which classes of a pattern a character belongs.

    With a normal form, also where it stands among combining marks, and with what it is composed.
    """
    around = "".join(f"{other}{char}{other}" for other in ("a", " A", " 1", " .", "\n", "\u00a0"))
    text = f"{char}{around} '{char}s {char}'s {char}{char} {char} \r{char}\t{char}"
    if normalizes:
        bases = "".join(f"{base}{char} " for base in _bases()[char])
        marks = f"a\u0345{char}\u0334{char}\u0316\u0301{char}\u0327 \u1100{char}\uac00{char}"
        text = f"{text}{marks} {bases}{char}"
    return text


@cache
def _bases() -> defaultdict[str, str]:
    """Character -> those with which it is composed to another, before it."""
    bases: defaultdict[str, str] = defaultdict(str)
    for code in [*range(0x3100), *range(0x10000, 0x1E000)]:
        decomposition = unicodedata.decomposition(chr(code)).split()
        if len(decomposition) == 2 and not decomposition[0].startswith("<"):
            base, mark = (chr(int(part, 16)) for part in decomposition)
            bases[mark] += base
    return bases


def replaced(
    texts: tuple[Ids, Lengths], others: tuple[Ids, Lengths], places: Sequence[int]
) -> tuple[Ids, Lengths]:
    """The ids of texts, some of which are put in the place of what is there.

    Args:
        texts: ids and lengths of all.
        others: ids and lengths of those that are put in.
        places: their numbers.
    """
    ids, lengths = texts
    chosen: NDArray[numpy.bool_] = numpy.zeros(len(lengths), numpy.bool_)
    chosen[list(places)] = True
    new_lengths = lengths.copy()
    new_lengths[chosen] = others[1]
    of_others = numpy.repeat(chosen, new_lengths)
    new_ids = numpy.empty(len(of_others), numpy.int64)
    new_ids[of_others], new_ids[~of_others] = others[0], ids[~numpy.repeat(chosen, lengths)]
    return new_ids, new_lengths
