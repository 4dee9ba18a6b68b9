"""Loss, perplexity and bits per byte of text files and data sets, with sliding windows.

Inputs: a loaded model, and texts (`.txt`, JSON lines, Parquet, any text) or `.bin/.idx` pairs.
Outputs: one `Score` per file.

Design notes:
- A window has as many tokens as the context of the model. The next window begins `stride` tokens
  later, and only the tokens that no window had before are scored, so that every token is scored
  once, with at least `context - stride` tokens before it. With a stride of the whole context
  nothing overlaps, and the windows are the samples of Megatron's data sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

from megatron_sffn.inference.eval_data import Data, Ids
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.text_table import text_table

if TYPE_CHECKING:
    from megatron_sffn.inference.model import InferenceModel


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window of a stream.

    Args:
        inputs: ids, at most as many as the context.
        labels: the token after each of them.
        first: the first label that no earlier window had.
    """

    inputs: Ids
    labels: Ids
    first: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """The loss over a file.

    Args:
        name: of the file.
        documents: streams that were read.
        tokens: scored tokens.
        total: sum of their losses, in nats.
        num_bytes: bytes of the text; None if the tokens have no text.
    """

    name: str
    documents: int
    tokens: int
    total: float
    num_bytes: int | None

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.total / self.tokens

    def record(self) -> dict[str, Any]:
        """The score as JSON; perplexity is per token."""
        bits = None if not self.num_bytes else self.total / math.log(2) / self.num_bytes
        return {
            "data": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": bits,
        }


def windows(ids: Ids, context: int, stride: int) -> Iterator[Window]:
    """Cut a stream into windows."""
    scored = 0  # labels that a window had
    for start in range(0, len(ids) - 1, stride):
        end = min(start + context, len(ids) - 1)
        yield Window(inputs=ids[start:end], labels=ids[start + 1 : end + 1], first=scored - start)
        scored = end
        if end == len(ids) - 1:
            return


def evaluate(
    model: InferenceModel,
    data: Data,
    *,
    stride: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Score a file; all ranks call it together.

    Args:
        model: the loaded model.
        data: the file.
        stride: tokens between the beginnings of two windows.
        batch_size: windows of a batch on each replica.
        progress: called with the number of tokens that were scored.
    """
    documents = tokens = 0
    num_bytes: int | None = 0
    total = 0.0
    batch: list[Window] = []

    def flush() -> float:
        losses = scores_of(model, batch)[0]
        count = sum(len(window.labels) - window.first for window in batch)
        summed = sum(
            float(row[window.first : len(window.labels)].double().sum())
            for window, row in zip(batch, losses, strict=True)
        )
        batch.clear()
        progress(count)
        return summed

    for stream in data.streams():
        documents += 1
        num_bytes = _sum(num_bytes, stream.num_bytes)
        for window in windows(stream.ids, model.context, stride):
            tokens += len(window.labels) - window.first
            batch.append(window)
            if len(batch) == batch_size * model.num_replicas:
                total += flush()
    if batch:
        total += flush()
    if not tokens:
        raise ConfigError(f"--data {data.name} has no token to score; give some text")
    return Score(
        name=data.name, documents=documents, tokens=tokens, total=total, num_bytes=num_bytes
    )


def _sum(first: int | None, second: int | None) -> int | None:
    """The sum of two numbers; None if one is not known."""
    return None if first is None or second is None else first + second


def scores_of(
    model: InferenceModel, batch: Sequence[Window], *, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of the labels of windows, padded at their ends, where nothing looks at them."""
    length = max(len(window.labels) for window in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.zeros_like(tokens)
    for row, window in enumerate(batch):
        tokens[row, : len(window.inputs)] = torch.from_numpy(window.inputs.astype(numpy.int64))
        labels[row, : len(window.labels)] = torch.from_numpy(window.labels.astype(numpy.int64))
    return model.score(tokens, labels, greedy=greedy)


def table(records: Iterable[dict[str, Any]]) -> str:
    """Scores as lines of text."""
    rows = [("data", "documents", "tokens", "loss", "perplexity", "bits per byte")]
    for record in records:
        bits = record["bits_per_byte"]
        rows.append(
            (
                record["data"],
                str(record["documents"]),
                str(record["tokens"]),
                f"{record['loss']:.4f}",
                f"{record['perplexity']:.2f}",
                "-" if bits is None else f"{bits:.4f}",
            )
        )
    return text_table(rows)
