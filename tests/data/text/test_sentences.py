"""Sentences equal those of Megatron-LM's tool with the same Punkt model."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from nltk.tokenize.punkt import (
    PunktLanguageVars,
    PunktSentenceTokenizer,
    PunktTrainer,
    save_punkt_params,
)

from megatron_sffn.data.text import sentences
from megatron_sffn.data.text.sentences import load_splitter
from megatron_sffn.utils.errors import ConfigError

TRAINING = "Dr. Jones met Mr. Smith. They spoke, e.g. of Mr. Brown. Mr. Brown was late! " * 20
TEXT = 'Mr. Smith came. "Late!"  He left,\n\nbut why?  Dr. Jones (3.5 m away...) knew. End'


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PunktSentenceTokenizer:
    """A Punkt model in a folder where NLTK searches."""
    import nltk.data

    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    params = PunktTrainer(TRAINING).get_params()
    save_punkt_params(params, str(folder / "english"))
    return PunktSentenceTokenizer(params)


def test_sentences_equal_those_of_megatron_lm(model: PunktSentenceTokenizer) -> None:
    actual = load_splitter("english", keep_newlines=False)(TEXT)
    assert actual == model.tokenize(TEXT)
    assert actual[:2] == ["Mr. Smith came.", '"Late!"']
    assert load_splitter("english", keep_newlines=False)("") == []


def test_newlines_are_kept(model: PunktSentenceTokenizer) -> None:
    actual = load_splitter("english", keep_newlines=True)(TEXT + "\n")
    assert actual[0] == "Mr. Smith came. "
    assert actual[2] == "He left,\n\nbut why?  "


def test_newlines_are_kept_as_megatron_lm_keeps_them(model: PunktSentenceTokenizer) -> None:
    class MegatronLanguageVars(PunktLanguageVars):
        _period_context_fmt = (
            r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"
        )

    megatron_splitter = PunktSentenceTokenizer(model._params, lang_vars=MegatronLanguageVars())
    split = load_splitter("english", keep_newlines=True)
    rng = random.Random(0)
    words = ["One", "two", ".", "!", "?", "...", "Mr.", "e.g.", "3.14", ")", "(", '"', ",", "\n\n"]
    for _ in range(500):
        text = "".join(rng.choice(words) + rng.choice(["", " ", "\n"]) for _ in range(20))
        assert split(text) == megatron_splitter.tokenize(text)


def test_splitting_long_words_takes_linear_time(model: PunktSentenceTokenizer) -> None:
    start = time.process_time()
    load_splitter("english", keep_newlines=True)("x" * 100_000 + " end. Next")
    assert time.process_time() - start < 5  # quadratic time would be a minute


def test_long_texts_are_split_into_pieces(
    model: PunktSentenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentences, "PIECE_CHARACTERS", 7)
    assert load_splitter("english", keep_newlines=False)("One two three") == ["One two", " three"]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("language", ["klingon", "../english", ""])
def test_a_missing_model_is_reported_in_one_sentence(language: str) -> None:
    with pytest.raises(ConfigError, match=f"--lang {language} has no Punkt model .* NLTK_DATA"):
        load_splitter(language, keep_newlines=False)


def test_a_missing_library_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match=r"needs nltk, .* install 'megatron-sffn\[sentences\]'"):
        load_splitter("english", keep_newlines=False)
