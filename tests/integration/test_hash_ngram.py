"""`--sffn-hash-ngram` in runs: the same model on every layout (methods R5)."""

from __future__ import annotations

import pytest

FLAGS = "--sffn-router rand-hash --num-layers 4 --train-iters 2 --split 90,10,0"
LAYOUT = """
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2 --recompute-granularity full --recompute-method uniform
    --recompute-num-layers 1
"""


def test_r5_n_grams_cross_the_shards_of_a_sequence(pretrain) -> None:
    unigrams, trigrams = (
        pretrain(1, f"{FLAGS} {ngram}").values("lm loss") for ngram in ("", "--sffn-hash-ngram 3")
    )
    on_four_ranks = pretrain(4, f"{FLAGS} --sffn-hash-ngram 3 {LAYOUT}").values("lm loss")
    assert on_four_ranks == pytest.approx(trigrams, rel=1e-5)
    assert unigrams[1] != pytest.approx(trigrams[1], rel=1e-4)
