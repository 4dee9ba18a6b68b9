"""Documents cut into sentences, as Megatron-LM's `--split-sentences` does.

Enters: a language whose Punkt model (Kiss and Strunk, 2006) is on this machine. Leaves: a function
from a text to its sentences.
Choices: NLTK (extra `sentences`), as in Megatron-LM, so that the sentences are the same; nothing is
fetched. Long texts are cut every `PIECE` characters first, as there.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_sffn.utils.errors import ConfigError, require

PIECE = 1_000_000

Splitter = Callable[[str], list[str]]


def load_splitter(language: str, *, keep_newlines: bool) -> Splitter:
    """A function that cuts a text into sentences.

    Args:
        language: name of a Punkt model: `english`.
        keep_newlines: white space behind a sentence stays part of it.

    Raises:
        ConfigError: NLTK or the model is missing.
    """
    require("nltk", "--split-sentences", "sentences")
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer

    class KeepingVars(PunktLanguageVars):
        # White space belongs to the end of a sentence. Without the first part, which only says
        # where a match can begin, long words would cost the square of their length.
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
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        return [sentence for piece in pieces for sentence in punkt.tokenize(piece)]

    return split
