"""Megatron's tokenizers, built before anything else, with one sentence when that fails.

Enters: Megatron's tokenizer flags. Leaves: the tokenizer that Megatron builds from them.
Choices: nothing is fetched unless HF_HUB_OFFLINE=0 is set. Megatron asks the hub about GPT-2 even
when its files are given: a folder that says the same is made of them, in the user's cache.
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

PARTS_OF_IDS = ("normalizer", "pre_tokenizer", "post_processor")
REBUILT_PROBES = (
    "In 2023 and 650841823, it's 1,000.50 DON'T we'll",
    "  leading, double   and trailing  \n\n\ttabs\r\n",
    "Grüße, e\u0301 ÉCOLE, ﬁ ½ 日本語 한국어 हिन्दी 🦙 \u00a0\u3000",
    "snake_case camelCase HTTPServer $%&*()[]{}<>|~^`@#!?;:",
)
"""Texts on which pre-tokenizers and normalizers differ."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer that Megatron built."""

    library: str
    path: str
    _tokenizer: Any
    """Megatron's wrapper of a library's tokenizer, for engines that go below both."""

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
        args: with the flags of Megatron's `TokenizerConfig`; not changed.
        need_eod: refuse a tokenizer without an end-of-document token.

    Raises:
        ConfigError: no type is named, its files are missing or unusable, or it has no eod.
    """
    # Padding the vocabulary concerns the model, and writes to the namespace.
    args = argparse.Namespace(**{**vars(args), "pad_vocab_size": False})
    chosen = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    localize_tokenizer(args)

    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        tokenizer: Tokenizer = build_tokenizer(args)
        eod = tokenizer.eod if need_eod else 0
    except Exception as error:  # each tokenizer library has its own errors
        if _is_hub_name(args):
            raise ConfigError(
                f"--tokenizer-model {args.tokenizer_model} is no folder here, and the hub's cache "
                "does not have it; give a folder, or set HF_HUB_OFFLINE=0 to have it fetched"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{chosen} cannot be loaded ({reason}); check the tokenizer flags"
        ) from error
    if eod is None or eod < 0:  # SentencePiece says -1
        raise ConfigError(
            f"{chosen} has no end-of-document token; leave out --append-eod, or name one as "
            "eos_token in tokenizer_config.json"
        )
    return tokenizer


def rebuilt(tokenizer: Tokenizer, model: str | None) -> str | None:
    """How a tokenizer differs from its `tokenizer.json`, if transformers did not take it from that.

    transformers 5 has classes that build a tokenizer from vocabulary and merges, with a normalizer,
    a pre-tokenizer and a post-processor of their own. A file may name such a class and mean others.

    Args:
        tokenizer: what Megatron built.
        model: `--tokenizer-model`.

    Returns:
        A sentence without an end; None if no difference was seen.
    """
    wrapped = getattr(tokenizer._tokenizer, "tokenizer", None)
    backend = getattr(wrapped, "backend_tokenizer", None)
    file = Path(model or "")
    file = file / "tokenizer.json" if file.is_dir() else file
    if backend is None or file.name != "tokenizer.json" or not file.is_file():
        return None
    written, built = json.loads(file.read_bytes()), json.loads(backend.to_str())
    if all(written.get(part) == built[part] for part in PARTS_OF_IDS):
        return None
    if built["model"].get("dropout"):  # each call has other ids
        return None
    from tokenizers import Tokenizer as Backend

    given = Backend.from_file(str(file))
    given.no_truncation()
    given.no_padding()
    given.encode_special_tokens = backend.encode_special_tokens
    # A user who sets one of these means another post-processor than the file has.
    config = _json_of(file.with_name("tokenizer_config.json"))
    special = not any(name in config for name in ("add_bos_token", "add_eos_token"))
    for text in [*REBUILT_PROBES, *(token["content"] for token in written.get("added_tokens", []))]:
        right, wrong = (
            one.encode(text, add_special_tokens=special).ids for one in (given, backend)
        )
        if right != wrong:
            return (
                f"--tokenizer-model {model} has the class {type(wrapped).__name__}, for which "
                f"transformers gives {wrong[:8]} for {text[:20]!a}, but its tokenizer.json gives "
                f'{right[:8]}; write "tokenizer_class": "PreTrainedTokenizerFast" in '
                "tokenizer_config.json"
            )
    return None


def _json_of(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return content


def localize_tokenizer(args: argparse.Namespace) -> None:
    """Change the flags so that Megatron finds the tokenizer on this machine.

    Args:
        args: with the flags of Megatron's `TokenizerConfig`; changed.

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
    """Whether a name that does not exist was meant as a path, not as a model of the hub."""
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
    """A folder that loads as the two files of GPT-2's tokenizer, the same for the same files."""
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
    """Megatron checks the same by assertions without words."""
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
    """The first of some texts that its ids do not give back, and what they give, from there on.

    Args:
        tokenizer: what Megatron built.
        texts: of the input.
    """
    for text in texts:
        ids = tokenizer.tokenize(text)
        # Ids that the tokenizer puts around every text are no change.
        back, inner = (tokenizer.detokenize(ids, skip) for skip in (None, True))
        if text not in (back, inner):
            pairs = enumerate(zip(text, back, strict=False))
            same = next((at for at, (one, other) in pairs if one != other), len(back))
            return text[same : same + 20], back[same : same + 20]
    return None
