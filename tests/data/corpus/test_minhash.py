"""Near-duplicates: estimates against exact similarities, and which pairs are compared."""

from __future__ import annotations

import random
import sys

import pytest

from megatron_sffn.data.corpus.minhash import MinHash, empty_index
from megatron_sffn.utils.errors import ConfigError

pytest.importorskip("rensa", reason="rensa is not installed")

WORDS = [f"word{number}" for number in range(5000)]


def minhash(threshold: float = 0.8, size: int = 5, unit: str = "words") -> MinHash:
    return MinHash(threshold=threshold, size=size, unit=unit)


def jaccard(one: str, other: str, size: int) -> float:
    grams = [
        {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
        for words in (one.split(), other.split())
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def pairs(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Texts of 300 words, the same with some words replaced, and how alike they are."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        words = rng.choices(WORDS, k=300)
        changed = [*words]
        for at in rng.sample(range(300), number % 30):
            changed[at] = "another"
        one, other = " ".join(words), " ".join(changed)
        found.append((one, other, jaccard(one, other, 5)))
    return found


def test_estimates_are_close_to_exact_similarities() -> None:
    settings = minhash()
    errors = [
        settings.sketch(one).jaccard(settings.sketch(other)) - exact
        for one, other, exact in pairs(150, seed=0)
    ]
    assert abs(sum(errors) / len(errors)) < 0.01
    assert max(map(abs, errors)) < 0.15


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_pairs_above_the_threshold_are_found(threshold: float) -> None:
    settings = minhash(threshold)
    looked_at = found = wrong = 0
    for one, other, exact in pairs(200, seed=1):
        index = empty_index(settings)
        index.add("0", settings.sketch(one))
        alike = bool(index.get_duplicates(settings.sketch(other)))
        if exact > threshold + 0.05:
            looked_at += 1
            found += alike
        wrong += alike and exact < threshold - 0.12
    assert looked_at > 10 and found / looked_at > 0.9
    assert wrong == 0


def test_bands_compare_the_pairs_above_the_threshold() -> None:
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands = minhash(threshold).num_bands
        rows = 128 // bands
        assert 1 - (1 - threshold**rows) ** bands >= 0.9
    assert minhash(0.8).num_bands == 16


def test_sketches_are_the_same_everywhere() -> None:
    # Of the version in constraints.txt; another one may have others, which is a change to note.
    assert minhash().sketch("one two three four five six").digest()[:3] == [
        3546576929,
        3296815444,
        3335706492,
    ]


def test_a_long_text_in_batches_has_the_same_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(WORDS)
    whole = minhash().sketch(text)
    monkeypatch.setattr("megatron_sffn.data.corpus.minhash.BATCH_NGRAMS", 7)
    assert minhash().sketch(text).digest() == whole.digest()


def test_ngrams_of_words_and_characters_count() -> None:
    words, characters = minhash(), minhash(unit="characters")
    one = "a b c d e f g"
    assert words.sketch(one).jaccard(words.sketch(one.upper())) == 1
    assert words.sketch(one).jaccard(words.sketch("g f e d c b a")) == 0
    # Shorter than an n-gram: the text is one.
    assert words.sketch("a b").jaccard(words.sketch("a b")) == 1
    assert words.sketch("a b").jaccard(words.sketch("a c")) == 0
    assert words.sketch("") is None
    # A script without spaces is one word.
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    changed = text.replace("名前", "名字")
    assert words.sketch(text).jaccard(words.sketch(changed)) == 0
    assert 0.4 < characters.sketch(text).jaccard(characters.sketch(changed)) < 1


@pytest.mark.parametrize(
    ("threshold", "size", "message"),
    [
        (0.0, 5, "--threshold 0.0 is no share from 0.1 to 1; 0.8 is usual"),
        (1.1, 5, "--threshold 1.1 is no share"),
        (float("nan"), 5, "--threshold nan is no share"),
        (0.8, 0, "--ngram 0 is less than 1; 5 words are usual"),
    ],
)
def test_numbers_out_of_range_are_refused(threshold: float, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minhash(threshold, size)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"needs rensa, .*'megatron-sffn\[dedup\]'"):
        minhash()
