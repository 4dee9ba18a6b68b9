"""Reads a Hugging Face folder: its configuration, its tensors, and whether it has a tokenizer.

Inputs: the folder of a model. Outputs: the configuration as transformers completes it, and the
tensors by their names. One sentence says what is missing or damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

import megatron_sffn.hf  # noqa: F401 (tells transformers about our class)
from megatron_sffn.utils.errors import ConfigError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has at least one."""

DERIVED = re.compile(r".*(\.rotary_emb\.inv_freq|\.attention\.(masked_)?bias)")
"""Tensors that old versions of transformers stored although the configuration defines them."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ConfigError: if the folder is no model.
    """
    if not folder.is_dir():
        raise ConfigError(f"--model {folder} is no folder; give the folder of a model")
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"--model {folder} has no {CONFIG}; give the folder of a model")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path} names no model_type; give the folder of a language model")
    return config


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of its class.

    Raises:
        ConfigError: if transformers does not accept it.
    """
    fields = {name: value for name, value in config.items() if name != "auto_map"}
    model_type = fields.pop("model_type")
    try:
        completed: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each class checks in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{CONFIG} is no configuration of {model_type} ({reason}); correct it"
        ) from error
    return dict(completed.to_dict())


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder.

    Raises:
        ConfigError: if a shard or a tensor is missing, or a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    expected = _shards(folder)
    for file, names in expected.items():
        tensors |= dict(_read_file(folder / file))
        missing = names - tensors.keys()
        if missing:
            raise ConfigError(
                f"{folder / file} has no tensor {min(missing)}, which {INDEX} names; copy the "
                "model again"
            )
    return {name: tensor for name, tensor in tensors.items() if not DERIVED.fullmatch(name)}


def has_tokenizer(folder: Path) -> bool:
    """True if a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def _shards(folder: Path) -> dict[str, set[str]]:
    """File -> the tensors that the index says it has; all files exist."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return {SINGLE: set()}
        others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        remedy = (
            f"load it with transformers and save_pretrained, since {others[0].name} is a pickle"
            if others
            else "copy the model with its weights"
        )
        raise ConfigError(f"--model {folder} has neither {SINGLE} nor {INDEX}; {remedy}")
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, set()).add(name)
    except (ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        raise ConfigError(f"{folder / INDEX} cannot be read; copy the model again") from error
    for file in sorted(shards):
        if Path(file).name != file:
            raise ConfigError(
                f"{folder / INDEX} names {file}, which is outside the folder; use another model"
            )
        if not (folder / file).is_file():
            raise ConfigError(f"shard {folder / file} is missing; copy the model with all shards")
    return shards


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}); copy it again") from error
