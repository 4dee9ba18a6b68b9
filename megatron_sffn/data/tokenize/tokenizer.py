"""Builds Megatron's tokenizers early, with a one-sentence error if that fails.

Inputs: Megatron's tokenizer flags. Outputs: the tokenizer that Megatron builds from them.

Design notes:
- Nothing is downloaded unless HF_HUB_OFFLINE=0 is set.
- Megatron asks the hub about GPT-2 even when its files are given, so the files are copied to a
  folder in the user's cache that transformers loads as the same tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from megatron_sffn.utils.errors import ConfigError

ID_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor")
"""Sections of tokenizer.json that determine ids, beside the model."""
REBUILD_PROBES = (
    "In 2023 and 650841823, it's 1,000.50 DON'T we'll",
    "  leading, double   and trailing  \n\n\ttabs\r\n",
    "Grüße, e\u0301 ÉCOLE, ﬁ ½ 日本語 한국어 हिन्दी 🦙 \u00a0\u3000",
    "snake_case camelCase HTTPServer $%&*()[]{}<>|~^`@#!?;:",
)
"""Texts on which pre-tokenizers and normalizers give different ids."""


class Tokenizer(Protocol):
    """The members of Megatron's tokenizers that we use."""

    library: str
    path: str
    _tokenizer: Any
    """Megatron's wrapper of a library's tokenizer, which engines unwrap."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eod(self) -> int | None:
        """Id of the end of a document."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`."""

    def detokenize(self, ids: list[int], skip_special_tokens: bool | None = None) -> str:
        """The text of `ids`."""


def load_tokenizer(args: argparse.Namespace, *, need_eod: bool = False) -> Tokenizer:
    """Build the tokenizer that the flags name.

    Args:
        args: namespace with the flags of Megatron's `TokenizerConfig`; not changed.
        need_eod: refuse a tokenizer without an end-of-document token.

    Raises:
        ConfigError: no type is named, its files are missing or unusable, or it has no eod.
    """
    # Padding the vocabulary concerns the model only, and would write to the namespace.
    args = argparse.Namespace(**{**vars(args), "pad_vocab_size": False})
    flags = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    localize_tokenizer(args)

    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        tokenizer: Tokenizer = build_tokenizer(args)
        eod = tokenizer.eod if need_eod else 0
    except Exception as error:  # each tokenizer library raises its own errors
        if _is_hub_name(args):
            raise ConfigError(
                f"--tokenizer-model {args.tokenizer_model} is no folder here, and the hub's cache "
                "does not have it; give a folder, or set HF_HUB_OFFLINE=0 to have it fetched"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{flags} cannot be loaded ({reason}); check the tokenizer flags"
        ) from error
    if eod is None or eod < 0:  # SentencePiece says -1
        raise ConfigError(
            f"{flags} has no end-of-document token; leave out --append-eod, or name one as "
            "eos_token in tokenizer_config.json"
        )
    return tokenizer


def eod_of(tokenizer: Tokenizer) -> int | None:
    """Id of a tokenizer's end of a document; None if it has none."""
    return _special_id(tokenizer, "eod")


def bos_of(tokenizer: Tokenizer) -> int | None:
    """Id of a tokenizer's beginning of a text; None if it has none."""
    return _special_id(tokenizer, "bos")


def _special_id(tokenizer: Tokenizer, name: str) -> int | None:
    try:
        token = getattr(tokenizer, name)
    except Exception:  # each tokenizer library raises its own errors
        return None
    return None if token is None or token < 0 else int(token)


def difference_from_file(tokenizer: Tokenizer, model: str | None) -> str | None:
    """Find a difference between the ids of a tokenizer and those of its `tokenizer.json`.

    Some classes of transformers 5 take only vocabulary and merges from the file, and build their
    own normalizer, pre-tokenizer and post-processor, whatever the file has.

    Args:
        tokenizer: the tokenizer that Megatron built.
        model: `--tokenizer-model`.

    Returns:
        A sentence for an error message; None if no difference was found.
    """
    wrapped = getattr(tokenizer._tokenizer, "tokenizer", None)
    backend = getattr(wrapped, "backend_tokenizer", None)
    file = Path(model or "")
    file = file / "tokenizer.json" if file.is_dir() else file
    if backend is None or file.name != "tokenizer.json" or not file.is_file():
        return None
    written, built = json.loads(file.read_bytes()), json.loads(backend.to_str())
    if all(written.get(section) == built[section] for section in ID_SECTIONS):
        return None
    if built["model"].get("dropout"):  # ids are random
        return None
    from tokenizers import Tokenizer as Backend

    of_file = Backend.from_file(str(file))
    of_file.no_truncation()
    of_file.no_padding()
    of_file.encode_special_tokens = backend.encode_special_tokens
    # A user who sets one of these flags wants another post-processor than that of the file.
    config = _json_of(file.with_name("tokenizer_config.json"))
    special = not any(name in config for name in ("add_bos_token", "add_eos_token"))
    for text in [*REBUILD_PROBES, *(token["content"] for token in written.get("added_tokens", []))]:
        expected, actual = (
            encoder.encode(text, add_special_tokens=special).ids for encoder in (of_file, backend)
        )
        if expected != actual:
            return (
                f"--tokenizer-model {model} has the class {type(wrapped).__name__}, for which "
                f"transformers gives {actual[:8]} for {text[:20]!a}, but its tokenizer.json gives "
                f'{expected[:8]}; write "tokenizer_class": "PreTrainedTokenizerFast" in '
                "tokenizer_config.json"
            )
    return None


def _json_of(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return content


def localize_tokenizer(args: argparse.Namespace) -> None:
    """Change the flags so that Megatron finds the tokenizer on this machine.

    Args:
        args: namespace with the flags of Megatron's `TokenizerConfig`; changed.

    Raises:
        ConfigError: no type is named, or its files are missing or do not fit.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.tokenizer_type is None:
        raise ConfigError(
            "--tokenizer-type is not given and there is no default; for a folder made by "
            "tools/train_tokenizer.py use: --tokenizer-type HuggingFaceTokenizer "
            "--tokenizer-model DIR"
        )
    for flag, path in (
        ("--tokenizer-model", args.tokenizer_model),
        ("--vocab-file", args.vocab_file),
        ("--merge-file", args.merge_file),
    ):
        if path is not None and not os.path.exists(path) and _is_path(path):
            raise ConfigError(f"{flag} {path} does not exist; give an existing file or folder")
    if args.tokenizer_type == "HuggingFaceTokenizer" and _is_json(args.tokenizer_model):
        args.tokenizer_model = _folder_of(args.tokenizer_model)
    elif args.tokenizer_type == "GPT2BPETokenizer":
        args.tokenizer_model = str(_gpt2_folder(args.vocab_file, args.merge_file))
        args.tokenizer_type, args.vocab_file, args.merge_file = "HuggingFaceTokenizer", None, None
    elif args.tokenizer_type == "TikTokenizer":
        _check_tiktoken(args)


def _is_path(name: str) -> bool:
    """True if a name that does not exist is probably a path, and not a model of the hub."""
    parent = os.path.dirname(name)
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isdir(parent)


def _is_hub_name(args: argparse.Namespace) -> bool:
    model = args.tokenizer_model
    return args.tokenizer_type == "HuggingFaceTokenizer" and model and not os.path.exists(model)


def _is_json(path: str | None) -> bool:
    return path is not None and path.endswith(".json") and os.path.isfile(path)


def _folder_of(path: str) -> str:
    if os.path.basename(path) != "tokenizer.json":
        raise ConfigError(
            f"--tokenizer-model {path} is a file of another name than tokenizer.json, which "
            "transformers looks for; give it that name in a folder of its own"
        )
    return os.path.dirname(path) or "."


def _gpt2_folder(vocab_file: str | None, merge_file: str | None) -> Path:
    """A folder in the cache, named by a hash, with the two files of GPT-2's tokenizer."""
    if vocab_file is None or merge_file is None:
        raise ConfigError(
            f"--tokenizer-type GPT2BPETokenizer has --vocab-file {vocab_file} and --merge-file "
            f"{merge_file}; give both, because nothing is fetched"
        )
    files = {"vocab.json": Path(vocab_file).read_bytes()}
    files["merges.txt"] = Path(merge_file).read_bytes()
    files["tokenizer_config.json"] = b'{"tokenizer_class": "GPT2Tokenizer"}\n'
    digest = hashlib.sha256(b"\0".join(files.values())).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_sffn"
    folder = cache / f"gpt2-{digest[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        for name, content in files.items():
            (partial / name).write_bytes(content)
        try:
            partial.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _check_tiktoken(args: argparse.Namespace) -> None:
    """Check the conditions that Megatron asserts without a message."""
    path = args.tokenizer_model
    if not _is_json(path):
        raise ConfigError(
            f"--tokenizer-model {path} is not what TikTokenizer reads: a JSON file with a list of "
            '{"rank": 0, "token_bytes": "AA==", "token_str": "..."}; convert it'
        )
    try:
        num_tokens = len(json.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ConfigError(
            f"--tokenizer-model {path} is not JSON ({error}); copy it again"
        ) from error
    special = args.tiktoken_num_special_tokens
    # Megatron's own default.
    vocab_size = args.vocab_size or 2**17
    if vocab_size > num_tokens + special:
        raise ConfigError(
            f"--vocab-size {vocab_size} is more than the {num_tokens} tokens of {path} and "
            f"--tiktoken-num-special-tokens {special}; give --vocab-size {num_tokens + special}"
        )


def changed_text(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[str, str] | None:
    """Find the first text whose ids decode to another text.

    Args:
        tokenizer: the tokenizer that Megatron built.
        texts: texts of the input.

    Returns:
        The text and the decoded text, from the first difference on; None if all texts are the same.
    """
    for text in texts:
        ids = tokenizer.tokenize(text)
        # Special tokens that the tokenizer adds around every text are not a change.
        decoded, without_special = (tokenizer.detokenize(ids, skip) for skip in (None, True))
        if text not in (decoded, without_special):
            pairs = enumerate(zip(text, decoded, strict=False))
            start = next((at for at, (before, after) in pairs if before != after), len(decoded))
            return text[start : start + 20], decoded[start : start + 20]
    return None
