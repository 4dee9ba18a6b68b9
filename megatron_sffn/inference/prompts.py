"""Prompts as ids, and continuations as text.

Inputs: the text of a prompt, and the tokenizer of the run. Outputs: ids that the model can read,
and the text that new tokens add to the prompt, also piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sffn.data.tokenize.tokenizer import Tokenizer, eod_of
from megatron_sffn.utils.errors import ConfigError


def encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The ids of a text, as the tokenizer gives them.

    Args:
        tokenizer: of the run.
        text: numbers for Megatron's NullTokenizer.
        name: of the text in an error.

    Raises:
        ConfigError: the tokenizer reads ids only, and this is other text.
    """
    try:
        return [int(token) for token in tokenizer.tokenize(text)]
    except ValueError as error:
        raise ConfigError(
            f"{name} is no list of ids, which is what the tokenizer of this run reads; give "
            "numbers with spaces between them"
        ) from error


def prompt_ids(tokenizer: Tokenizer, text: str, name: str = "--prompt") -> list[int]:
    """The ids of a prompt; an empty prompt is the beginning of a document.

    Args:
        tokenizer: of the run.
        text: the prompt; numbers for Megatron's NullTokenizer.
        name: of the prompt in an error.

    Raises:
        ConfigError: the tokenizer cannot read the prompt.
    """
    eod = eod_of(tokenizer)
    if not text:
        if eod is None:
            raise ConfigError(
                f"{name} is empty, and the tokenizer has no end of a document to begin with; give "
                "some text"
            )
        return [eod]
    shown = f"{name} {text[:40]!r}{'...' if len(text) > 40 else ''}"
    ids = encode(tokenizer, text, shown)
    unknown = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
    if unknown:
        raise ConfigError(
            f"{shown} has the id {unknown[0]}, but the ids are 0 to {tokenizer.vocab_size - 1}; "
            "leave it out"
        )
    if not ids:
        raise ConfigError(f"{shown} has no tokens; give other text")
    if len(ids) > 1 and ids[-1] == eod:
        ids.pop()  # some tokenizers end every text, and a prompt goes on
    return ids


def check_length(ids: Sequence[int], new_tokens: int, context: int, name: str = "--prompt") -> None:
    """Check that a prompt and its continuation fit into the context.

    Raises:
        ConfigError: they do not.
    """
    if len(ids) + new_tokens > context:
        room = context - len(ids)
        remedy = f"give --max-new-tokens {room}" if room > 0 else f"cut it to {context - 1} tokens"
        raise ConfigError(
            f"{name} has {len(ids)} tokens, and with {new_tokens} new ones they are more than the "
            f"context of the model, {context} tokens; {remedy}"
        )


class TextStream:
    """The text of a growing continuation, in pieces that are never taken back.

    Args:
        tokenizer: of the run.
        prompt: ids of the prompt: some tokenizers write a token differently at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.prompt = [*prompt]
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """Add a token; returns the new text, which is empty within a character."""
        self.tokens.append(token)
        text = continuation_text(self.tokenizer, self.prompt, self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new

    def rest(self) -> str:
        """The text that was held back because a character might not be complete."""
        return continuation_text(self.tokenizer, self.prompt, self.tokens)[len(self.text) :]


def continuation_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text that tokens add to a prompt."""
    if not tokens:
        return ""
    before, whole = tokenizer.detokenize(prompt), tokenizer.detokenize(prompt + tokens)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.detokenize(tokens)
