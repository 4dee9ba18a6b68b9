"""Near-duplicates: estimates against exact similarities, and which pairs are compared."""

from __future__ import annotations

import random
import sys

import pytest

from megatron_sffn.data.corpus.minhash import MinHash, empty_index
from megatron_sffn.utils.errors import ConfigError

pytest.importorskip("rensa", reason="rensa is not installed")

WORDS = [f"word{number}" for number in range(5000)]


def make_minhash(threshold: float = 0.8, size: int = 5, unit: str = "words") -> MinHash:
    return MinHash(threshold=threshold, size=size, unit=unit)


def jaccard(text: str, changed_text: str, size: int) -> float:
    grams = [
        {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
        for words in (text.split(), changed_text.split())
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def make_pairs(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Pairs of a text of 300 words and its copy with some words replaced, and their similarity."""
    rng = random.Random(seed)
    text_pairs = []
    for number in range(count):
        words = rng.choices(WORDS, k=300)
        changed_words = [*words]
        for position in rng.sample(range(300), number % 30):
            changed_words[position] = "another"
        text, changed_text = " ".join(words), " ".join(changed_words)
        text_pairs.append((text, changed_text, jaccard(text, changed_text, 5)))
    return text_pairs


def test_estimates_are_close_to_exact_similarities() -> None:
    hasher = make_minhash()
    errors = [
        hasher.sketch(text).jaccard(hasher.sketch(changed_text)) - similarity
        for text, changed_text, similarity in make_pairs(150, seed=0)
    ]
    assert abs(sum(errors) / len(errors)) < 0.01
    assert max(map(abs, errors)) < 0.15


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_pairs_above_the_threshold_are_found(threshold: float) -> None:
    hasher = make_minhash(threshold)
    similar_pairs = detected = false_positives = 0
    for text, changed_text, similarity in make_pairs(200, seed=1):
        index = empty_index(hasher)
        index.add("0", hasher.sketch(text))
        is_duplicate = bool(index.get_duplicates(hasher.sketch(changed_text)))
        if similarity > threshold + 0.05:
            similar_pairs += 1
            detected += is_duplicate
        false_positives += is_duplicate and similarity < threshold - 0.12
    assert similar_pairs > 10 and detected / similar_pairs > 0.9
    assert false_positives == 0


def test_bands_find_90_percent_of_the_pairs_at_the_threshold() -> None:
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands = make_minhash(threshold).num_bands
        rows = 128 // bands
        assert 1 - (1 - threshold**rows) ** bands >= 0.9
    assert make_minhash(0.8).num_bands == 16


def test_sketches_do_not_depend_on_the_machine() -> None:
    # Sketches of the rensa version in constraints.txt; another version may give others.
    assert make_minhash().sketch("one two three four five six").digest()[:3] == [
        3546576929,
        3296815444,
        3335706492,
    ]


def test_hashing_a_long_text_in_batches_gives_the_same_sketch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = " ".join(WORDS)
    expected = make_minhash().sketch(text)
    monkeypatch.setattr("megatron_sffn.data.corpus.minhash.BATCH_NGRAMS", 7)
    assert make_minhash().sketch(text).digest() == expected.digest()


def test_similarity_counts_ngrams_of_words_or_characters() -> None:
    words, characters = make_minhash(), make_minhash(unit="characters")
    letters = "a b c d e f g"
    assert words.sketch(letters).jaccard(words.sketch(letters.upper())) == 1
    assert words.sketch(letters).jaccard(words.sketch("g f e d c b a")) == 0
    # A text that is shorter than an n-gram counts as one n-gram.
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
        make_minhash(threshold, size)


def test_a_missing_library_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"needs rensa, .*'megatron-sffn\[dedup\]'"):
        make_minhash()
