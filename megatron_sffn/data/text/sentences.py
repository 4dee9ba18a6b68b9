"""Splits documents into sentences, as Megatron-LM's `--split-sentences` does.

Inputs: a language whose Punkt model (Kiss and Strunk, 2006) is on this machine.
Outputs: a function from a text to its sentences.

Design notes:
- NLTK (extra `sentences`) splits the text, as in Megatron-LM, so that the sentences are the same.
  Nothing is downloaded.
- Texts are first cut every `PIECE_CHARACTERS` characters, as in Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_sffn.utils.errors import ConfigError, require

PIECE_CHARACTERS = 1_000_000

Splitter = Callable[[str], list[str]]


def load_splitter(language: str, *, keep_newlines: bool) -> Splitter:
    """A function that splits a text into sentences.

    Args:
        language: name of a Punkt model, such as `english`.
        keep_newlines: the white space after a sentence stays part of the sentence.

    Raises:
        ConfigError: NLTK or the model is missing.
    """
    require("nltk", "--split-sentences", "sentences")
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer

    class KeepingVars(PunktLanguageVars):
        # White space belongs to the end of a sentence. The first group only tells where a match
        # can begin; without it, long words would take time quadratic in their length.
        _period_context_fmt = (
            r"(?:(?<!\S)|(?<=%(SentEndChars)s))"
            r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"
        )

    try:
        punkt = PunktTokenizer(language)
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"--lang {language} has no Punkt model on this machine; put nltk_data's "
            f"tokenizers/punkt_tab/{language} into the folder that NLTK_DATA names"
        ) from error
    if keep_newlines:
        punkt = PunktSentenceTokenizer(punkt._params, lang_vars=KeepingVars())

    def split(text: str) -> list[str]:
        pieces = [
            text[start : start + PIECE_CHARACTERS]
            for start in range(0, len(text), PIECE_CHARACTERS)
        ]
        return [sentence for piece in pieces for sentence in punkt.tokenize(piece)]

    return split
