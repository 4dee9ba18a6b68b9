"""Near-duplicate detection by MinHash.

Inputs: texts. Outputs: a sketch of each, and an index that finds the sketches similar to a given
one.

Design notes:
- MinHash (Broder 1997) of the lower-case n-grams, with `HASHES` values. Two texts are
  near-duplicates if their estimated Jaccard similarity reaches the threshold; the standard
  deviation of the estimate is about 0.04 at 0.8.
- The index compares pairs that agree in one of several bands (locality-sensitive hashing). Their
  number is chosen so that `RECALL` of the pairs at the threshold are compared, and nearly all pairs
  above it.
- The library is rensa: half a megabyte of Rust without dependencies, and 100 times as fast as
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
BATCH_NGRAMS = 1 << 10
"""N-grams in memory at once: all n-grams of a text are many times its size. `batched` allocates a
full batch for every text; for 60 words this takes 13 microseconds, and 73 at 1 << 16."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """The settings of near-duplicate detection.

    Args:
        threshold: least Jaccard similarity of near-duplicates: n-grams in both, of those in either.
        size: n.
        unit: `words`, or `characters` for scripts without spaces between words.

    Raises:
        ConfigError: a number is out of range, or rensa is not installed.
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
        """Number of bands of a sketch; pairs that agree in one band are compared."""
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
        for ngrams in batched(self._ngrams(text.lower()), BATCH_NGRAMS):
            sketch.update(ngrams)
        return sketch

    def _ngrams(self, text: str) -> Iterable[str]:
        units = text.split(" ") if self.unit == "words" else text
        if len(units) <= self.size:
            return [text]
        separator = " " if self.unit == "words" else ""
        shifted = (units[start:] for start in range(self.size))
        return map(separator.join, zip(*shifted, strict=False))


def rensa() -> Any:
    """The library rensa, or an error that tells how to install it."""
    require("rensa", "--near", "dedup")
    import rensa as library

    return library


def empty_index(minhash: MinHash) -> Any:
    """An empty index of sketches."""
    return rensa().RMinHashDeduplicator(
        threshold=minhash.threshold, num_perm=HASHES, use_lsh=True, num_bands=minhash.num_bands
    )
