"""When two texts are nearly the same.

Enters: texts. Leaves: sketches of them, and an index that finds those like a given one.

Choices
- MinHash (Broder 1997) of the n-grams in lower case, `HASHES` values. A pair is alike if the
  estimate of its Jaccard similarity reaches the threshold; it deviates by about 0.04 at 0.8.
- The index looks at pairs that agree in one of several bands: as many as it takes to look at
  `RECALL` of the pairs at the threshold, and at nearly all that are more alike.
- The library is rensa: half a megabyte of Rust that needs nothing else, and 100 times as fast as
  datasketch, which needs scipy (9.5 MB of Python source, one core: 676 and 6 MB/s).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import batched
from typing import Any

from megatron_sffn.utils.errors import ConfigError, require

HASHES = 128
SEED = 42
RECALL = 0.9
UNITS = ("words", "characters")
AT_ONCE = 1 << 10
"""N-grams in memory at once. A text has many times its size of them, and `batched` makes room for
all of this for every text: of 60 words they cost 13 microseconds, at 1 << 16 it would be 73."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """What near-duplicates are.

    Args:
        threshold: least share of n-grams that two documents have in common, of all they have.
        size: n.
        unit: `words`, or `characters` for scripts that do not space their words.

    Raises:
        ConfigError: a number that cannot be, or no library.
    """

    threshold: float
    size: int
    unit: str

    def __post_init__(self) -> None:
        if not 0.1 <= self.threshold <= 1:
            raise ConfigError(
                f"--threshold {self.threshold} is no share from 0.1 to 1; 0.8 is usual, and lower "
                "ones find documents that are less alike"
            )
        if self.size < 1:
            raise ConfigError(f"--ngram {self.size} is less than 1; 5 words are usual")
        rensa()

    @property
    def num_bands(self) -> int:
        """In how many equal parts sketches are looked up; candidates agree in one of them."""
        return next(
            bands
            for bands in (1, 2, 4, 8, 16, 32, 64, 128)
            if 1 - (1 - self.threshold ** (HASHES // bands)) ** bands >= RECALL
        )

    def sketch(self, text: str) -> Any:
        """The MinHash of a text; None if it is empty."""
        if not text:
            return None
        sketch = rensa().RMinHash(num_perm=HASHES, seed=SEED)
        for some in batched(self._ngrams(text.lower()), AT_ONCE):
            sketch.update(some)
        return sketch

    def _ngrams(self, text: str) -> Iterable[str]:
        units = text.split(" ") if self.unit == "words" else text
        if len(units) <= self.size:
            return [text]
        joint = " " if self.unit == "words" else ""
        return map(joint.join, zip(*(units[at:] for at in range(self.size)), strict=False))


def rensa() -> Any:
    """The library, or one sentence on how to get it."""
    require("rensa", "--near", "dedup")
    import rensa as library

    return library


def empty_index(minhash: MinHash) -> Any:
    """An index of sketches, empty."""
    return rensa().RMinHashDeduplicator(
        threshold=minhash.threshold, num_perm=HASHES, use_lsh=True, num_bands=minhash.num_bands
    )
