"""The blends of a run: prefixes and weights, from flags and from the files that flags name.

Inputs: the validated namespace. Outputs: the blends that Megatron reads from it.

Design notes:
- Megatron splits lists at white space, and its assertions on them have no messages, so each list is
  checked first.
"""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sffn.utils.errors import ConfigError

SPLITS = ("train", "valid", "test")
Blend = tuple[list[str], list[float] | None]


def read_blends(args: Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """One blend for all splits, or a blend for each; both None if there are no data paths.

    Raises:
        ConfigError: a file cannot be read; a list consists neither of prefixes nor of weights and
            prefixes; or a weight is not a positive, finite number.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    lists_of_flags = _lists(args)
    for flag, words in lists_of_flags.items():
        _check_list(flag, words)
    try:
        blend, blends = get_blend_and_blend_per_split(args)
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the data paths cannot be read ({type(error).__name__}: {error}); give --data-path "
            "PREFIX, or WEIGHT PREFIX for each of several, or files with such lists"
        ) from error
    return blend, blends


def _lists(args: Namespace) -> dict[str, list[str]]:
    """Flag, with the file that it names -> the words of its list."""
    lists = {}
    for dest in ("data_path", *(f"{split}_data_path" for split in SPLITS)):
        if (words := getattr(args, dest)) is not None:
            lists["--" + dest.replace("_", "-")] = words
    if path := args.data_args_path:
        lists[f"--data-args-path {path}"] = _read("--data-args-path", path).split()
    if path := args.per_split_data_args_path:
        flag = f"--per-split-data-args-path {path}"
        content = _json_object(flag, _read("--per-split-data-args-path", path))
        for split in SPLITS:
            value = content[split]
            words = value.split() if isinstance(value, str) else value
            if words is not None:
                lists[f"{split!r} of {flag}"] = words
    return lists


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise ConfigError(
            f"{flag} {path} cannot be read ({reason}); give a file that this user can read"
        ) from error


def _json_object(flag: str, text: str) -> dict[str, Any]:
    form = '{"train": [...], "valid": [...], "test": [...]}, with null where a split has no data'
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is not JSON ({error}); write {form}") from error
    missing = [split for split in SPLITS if not isinstance(content, dict) or split not in content]
    if missing:
        raise ConfigError(f"{flag} has no {', '.join(map(repr, missing))}; write {form}")
    for split in SPLITS:
        value = content[split]
        words = value if isinstance(value, list) else []
        if not isinstance(value, str | list | None) or not all(
            isinstance(word, str) for word in words
        ):
            raise ConfigError(
                f"{flag} has under {split!r} no list of strings; write weights as strings, too: "
                '["0.7", "PREFIX", "0.3", "PREFIX"]'
            )
    result: dict[str, Any] = content
    return result


def _check_list(flag: str, words: Sequence[str]) -> None:
    if not words:
        raise ConfigError(f"{flag} is empty; give PREFIX, or WEIGHT PREFIX for each of several")
    for word in words:
        if word[:1] in ("#", '"', "'") and not os.path.exists(f"{word}.idx"):
            raise ConfigError(
                f"{flag} holds {word}, and every word of it is read as a weight or a prefix, "
                "without comments and quotes; remove them"
            )
    numbers = [_number(word) for word in words]
    weighted = len(words) % 2 == 0 and None not in numbers[::2]
    for word, number in zip(words, numbers, strict=True):
        if number is not None and not weighted and not os.path.exists(f"{word}.idx"):
            raise ConfigError(
                f"{flag} has weights for some data sets only ({word} is one); give one before "
                "each prefix, or none"
            )
    if weighted:
        check_weights(flag, [number or 0.0 for number in numbers[::2]])


def check_weights(flag: str, weights: Sequence[float]) -> None:
    """Refuse weights from which no shares can be computed.

    Raises:
        ConfigError: one is not positive, or the sum is not finite.
    """
    listed = ", ".join(f"{weight:g}" for weight in weights)
    if not all(weight > 0 for weight in weights):
        raise ConfigError(
            f"{flag} ({listed}) has a weight that is not positive; leave out the data sets that "
            "are not to be read"
        )
    if not math.isfinite(sum(weights)):
        raise ConfigError(
            f"{flag} ({listed}) has weights without a finite sum; give smaller numbers"
        )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
