"""Losses of texts and data sets: Megatron's, on every layout, with every stride."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.inference.eval_data import open_data
from megatron_sffn.inference.evaluate import evaluate, windows
from megatron_sffn.utils.errors import ConfigError
from tests.support import tokenizers
from tests.support.checkpoints import MODELS
from tests.support.pretraining import run_pretraining, write_bytes
from tests.support.slow import slow

CONTEXT = 64
ALL = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
)
TEXT = "def f(x):\n    return x  # Grüße\n" * 9


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A document of whole samples: 20 times the context, and one token."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").write_bytes(Path(__file__).read_bytes()[: 20 * CONTEXT + 1])
    return write_bytes(folder / "validation", [folder / "text"])


def score(name: str, stride: int = CONTEXT, batch_size: int = 3) -> Callable[[Any], Any]:
    def of(model: Any) -> Any:
        data = open_data(name, model.tokenizer, "text")
        return evaluate(model, data, stride=stride, batch_size=batch_size).record()

    return of


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 30])
def test_windows_score_every_token_once_with_enough_context(length: int, stride: int) -> None:
    ids, scored = numpy.arange(length), []
    for window in windows(ids, 8, stride):
        assert len(window.inputs) == len(window.labels) <= 8
        assert (window.labels == window.inputs + 1).all()
        new = window.labels[window.first :].tolist()
        assert all(label - window.inputs[0] >= min(label, 8 - stride + 1) for label in new)
        scored += new
    assert scored == list(range(1, length))


@pytest.mark.parametrize("router", ["switch", *(slow(router) for router in MODELS)])
def test_the_loss_of_a_data_set_is_that_of_megatrons_evaluation(
    use, trained, text: str, data_set: str, bytes_tokenizer: str, tmp_path: Path, router: str
) -> None:
    flags = (
        f"{MODELS[router]} --tokenizer-type HuggingFaceTokenizer --tokenizer-model "
        f"{bytes_tokenizer} --load {trained(router)} --save run --save-interval 9 --skip-train "
        f"--train-iters 2 --eval-global-batch-size 4 --full-validation --train-data-path {text} "
        f"--valid-data-path {data_set}"
    )
    run_pretraining(1, flags, data="", folder=tmp_path)
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"]
    record = use(trained(router), score(data_set))
    assert record["loss"] == pytest.approx(expected, rel=1e-6)
    assert record["tokens"] == 20 * CONTEXT


@pytest.mark.parametrize(
    ("router", "ranks", "layout"),
    [
        ("rand-hash", 4, ALL),
        slow("avg-k", 4, ALL),
        slow("pkm", 2, "--expert-model-parallel-size 2"),
        slow("dense", 3, ""),
        slow("switch", 2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    ],
)
def test_every_layout_has_the_loss_of_one_rank(
    use, trained, data_set: str, router: str, ranks: int, layout: str
) -> None:
    alone = use(trained(router), score(data_set, stride=24))
    several = use(trained(router), score(data_set, stride=24, batch_size=5), layout, ranks)
    assert several["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert several["tokens"] == alone["tokens"] == 20 * CONTEXT


def test_texts_are_scored_from_their_first_token_on(use, trained, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(TEXT)
    lines = [json.dumps({"text": text}) for text in (TEXT, "", TEXT[:50])]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    stride = 10

    def scored(model: Any) -> Any:
        # The loss of every token, computed with a forward pass of its own.
        ids = [model.eod, *TEXT.encode()]
        total = 0.0
        for label in range(1, len(ids)):
            start = max(0, -(-(label - CONTEXT) // stride)) * stride
            tokens = torch.tensor([ids[start:label]])
            losses, _ = model.score(tokens, torch.tensor([ids[start + 1 : label + 1]]))
            total += float(losses[0, -1])
        of_logits, hits = model.score(tokens, tokens, greedy=True)
        of_labels, _ = model.score(tokens, tokens)
        torch.testing.assert_close(of_logits, of_labels)
        likeliest = model.forward(tokens)[..., : model.vocab_size].argmax(-1).cpu()
        assert torch.equal(hits, likeliest == tokens)
        names = ("plain", "lines.jsonl")
        return total, [score(str(tmp_path / name), stride)(model) for name in names]

    total, (plain, lines_record) = use(trained("avg-k"), scored)
    size = len(TEXT.encode())
    assert plain["tokens"] == plain["bytes"] == size
    assert plain["loss"] == pytest.approx(total / size, rel=1e-5)
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]))
    assert plain["bits_per_byte"] == pytest.approx(plain["loss"] / math.log(2))
    assert (lines_record["documents"], lines_record["tokens"]) == (
        2,
        size + len(TEXT[:50].encode()),
    )


def test_bytes_of_a_data_set_are_those_of_its_text(tmp_path: Path, bytes_tokenizer: str) -> None:
    tokenizer = _tokenizer(["HuggingFaceTokenizer", bytes_tokenizer])
    (tmp_path / "text").write_text(TEXT)
    prefix = write_bytes(tmp_path / "set", [tmp_path / "text"])
    (stream,) = open_data(prefix, tokenizer, "text").streams()
    assert stream.num_bytes == len(TEXT.encode()) - 1  # the first token is only context
    assert open_data(f"{prefix}.idx", tokenizer, "text").name == f"{prefix}.idx"


@pytest.mark.filterwarnings("ignore")
def test_bad_data_is_one_sentence(tmp_path: Path, bytes_tokenizer: str) -> None:
    tokenizer = _tokenizer(["HuggingFaceTokenizer", bytes_tokenizer])
    small = _tokenizer(["NullTokenizer", None], vocab_size=90)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "lines.jsonl").write_text('{"content": "x"}\n')
    prefix = write_bytes(tmp_path / "set", [tmp_path / "text"])
    for name, tokenizer_, message in (
        (str(tmp_path / "nothing"), tokenizer, r"^--data .*nothing does not exist; give"),
        (f"{tmp_path}/none.bin", tokenizer, r"none.idx does not exist; give the path"),
        (prefix, small, r"^--data .*set has the id 195, but the ids .* are 0 to 89; make"),
        (str(tmp_path / "lines.jsonl"), tokenizer, r"line 1 .* no key 'text' .*; name"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(open_data(name, tokenizer_, "text").streams())


def test_a_text_without_ids_is_refused_where_the_tokenizer_reads_ids_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("two words")
    tokenizer = _tokenizer(["NullTokenizer", None], vocab_size=90)
    data = open_data(str(tmp_path / "a.txt"), tokenizer, "text")
    with pytest.raises(ConfigError, match=r"a text of --data .*a.txt is no list of ids, which is"):
        list(data.streams())


def _tokenizer(kind: list[Any], **flags: Any) -> Any:
    args = tokenizers.arguments([])
    args.tokenizer_type, args.tokenizer_model = kind
    vars(args).update(flags)
    return load_tokenizer(args)
