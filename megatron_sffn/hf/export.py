"""Writes a checkpoint as a folder that transformers loads.

Inputs: the folder of a run. Outputs: a folder with safetensors, configuration, tokenizer, settings
of generation and a model card, and `modeling_sparse_ffn.py` where no class of transformers computes
the same.

Design notes: tensors are read whole from the shards (`checkpoints/tensors.py`), so that one process
without a model exports a checkpoint of any layout. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from megatron_sffn.checkpoints import files
from megatron_sffn.checkpoints.tensors import by_layer, read_tensors
from megatron_sffn.data.tokenize.tokenizer import eod_of, load_tokenizer, localize_tokenizer
from megatron_sffn.hf import modeling_sparse_ffn
from megatron_sffn.hf.architectures import CLASSES, choose_architecture, config_fields
from megatron_sffn.hf.model_card import model_card
from megatron_sffn.hf.names import SPARSE_FFN, to_architecture
from megatron_sffn.hf.settings import Settings, settings_of
from megatron_sffn.inference.checkpoint_args import Source, read_source
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import gpt_name
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.descriptors import subsets_of_cells
from megatron_sffn.nn.routers.rand_hash import RandHashConfig, blocks_of_ids
from megatron_sffn.utils.atomic_files import atomic_folder
from megatron_sffn.utils.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of `--dtype` -> dtype."""

KEPT_IN_FP32 = (
    "expert_bias",
    "qb_beta",
    "e_score_correction_bias",
    "descriptor_average",
    "descriptor_started",
)
"""Ends of the names of tensors that choose blocks, which are fp32 in every model."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
"""Files of a tokenizer of transformers."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported.

    Args:
        architecture: `model_type` of the folder.
        reason: why this architecture, in a clause.
        iteration: of the checkpoint.
        parameters: elements of all tensors.
        notes: what the user should know, in sentences.
    """

    architecture: str
    reason: str
    iteration: int
    parameters: int
    notes: list[str]


def export(
    load: Path,
    output: Path,
    *,
    step: int | None = None,
    architecture: str = "auto",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    without_capacity: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        load: folder of the run.
        output: the new folder.
        step: iteration; None for the one that training would load.
        architecture: a key of `CLASSES`, `SPARSE_FFN`, or `auto`.
        dtype: key of `DTYPES`; None for the dtype of the checkpoint.
        max_shard_size: largest size of a file, such as `5GB`.
        tokenizer: `--tokenizer-model`, if it is at another place than in the run.
        without_capacity: export Switch without the capacity of its blocks.
        overwrite: replace an existing folder.

    Raises:
        ConfigError: if the checkpoint is damaged or cannot be exported exactly; nothing is written.
    """
    source = source_of(load, step)
    folder, saved = source.folder, source.args
    if tokenizer is not None:
        saved = Namespace(**{**vars(saved), "tokenizer_model": tokenizer})
    settings = settings_of(saved, without_capacity=without_capacity)
    architecture, reason = choose_architecture(settings, architecture)
    tokenizer_files, eod, vocab_size, notes = _tokenizer_of(saved)
    if without_capacity and vars(saved).get("moe_expert_capacity_factor") is not None:
        notes.append(
            f"The capacity factor {saved.moe_expert_capacity_factor} of training is left out: no "
            "token is dropped, so outputs differ from the run's where it dropped some."
        )
    tensors = exported_tensors(folder, settings, architecture)
    if dtype is not None:
        tensors = {name: _cast(name, tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    config = config_of(settings, architecture, tensors, eod)
    iteration = 0 if folder.name == "release" else files.iteration_of(folder)
    exported = Export(
        architecture=architecture,
        reason=reason,
        iteration=iteration,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        notes=notes,
    )
    try:
        with atomic_folder(output, overwrite=overwrite) as partial:
            write_shards(tensors, partial, max_shard_size)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            generation_config(settings, eod, vocab_size).save_pretrained(partial)
            for path in tokenizer_files:
                shutil.copyfile(path, partial / path.name)
            if architecture == SPARSE_FFN:
                shutil.copy(modeling_sparse_ffn.__file__, partial)
            card = model_card(settings, load, exported)
            (partial / "README.md").write_text(card)
    except FileExistsError as error:
        raise ConfigError(
            f"--output {output} exists; give another folder, or add --overwrite to replace it"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error}); give a folder that can"
        ) from error
    return exported


def source_of(load: Path, step: int | None) -> Source:
    """The iteration of a run, and its arguments.

    Raises:
        ConfigError: if there is none, or it is damaged, names code, or has no arguments.
    """
    source = read_source(load, step)
    if "num_layers" not in vars(source.args):
        raise ConfigError(
            f"checkpoint {source.folder} does not hold the arguments of its run; give one that "
            "megatron_sffn.pretrain saved"
        )
    return source


# Tensors


def exported_tensors(folder: Path, settings: Settings, architecture: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names of an architecture."""
    tensors = by_layer(read_tensors(folder))
    if (pattern := settings.hybrid_pattern) is not None:
        tensors = {gpt_name(name, pattern): tensor for name, tensor in tensors.items()}
    if settings.sffn is not None and settings.sffn.backend is Backend.MEGATRON:
        tensors = dict(_tables_of_experts(tensors, settings))
    if settings.args.layernorm_zero_centered_gamma:
        # Megatron stores gamma - 1.
        tensors = {
            name: tensor + 1 if _is_gamma(name) else tensor for name, tensor in tensors.items()
        }
    if architecture in CLASSES:
        for layer in settings.sparse_layers:
            for name, shape in CLASSES[architecture].filled(settings).items():
                tensors[f"decoder.layers.{layer}.mlp.{name}"] = torch.zeros(shape)
    renamed = to_architecture(tensors, architecture, settings.sizes)
    if architecture == SPARSE_FFN and settings.sffn is not None:
        renamed |= derived_buffers(settings, settings.sffn)
    return renamed


def _is_gamma(name: str) -> bool:
    return name.endswith(("layer_norm_weight", "layernorm.weight"))


def _tables_of_experts(
    tensors: Mapping[str, Tensor], settings: Settings
) -> Iterator[tuple[str, Tensor]]:
    """Tables of cells from Megatron's experts (`--sffn-backend megatron`)."""
    for name, tensor in tensors.items():
        prefix, found, rest = name.partition(".mlp.experts.experts.")
        if not found:
            yield name, tensor
        elif rest == "linear_fc2.weight":  # [B, D, G]
            yield f"{prefix}.mlp.experts.values", tensor.transpose(1, 2).flatten(0, 1)
        elif settings.gated:  # [B, 2G, D]
            gate_keys, keys = tensor.chunk(2, dim=1)
            yield f"{prefix}.mlp.experts.gate_keys", gate_keys.flatten(0, 1)
            yield f"{prefix}.mlp.experts.keys", keys.flatten(0, 1)
        else:
            yield f"{prefix}.mlp.experts.keys", tensor.flatten(0, 1)


def derived_buffers(settings: Settings, sffn: SparseFFNConfig) -> dict[str, Tensor]:
    """Buffers of our class that a checkpoint does not carry, since hashes define them."""
    buffers = {}
    for index, layer in enumerate(settings.sparse_layers):
        router = sffn.of_layer(index).router
        prefix, number = f"model.layers.{layer}.mlp.router", layer + 1
        if isinstance(router, RandHashConfig) and router.balance is None:
            ids = torch.arange(settings.args.padded_vocab_size)
            buffers[f"{prefix}.map"] = blocks_of_ids(ids, sffn.of_layer(index), number).int()
        elif isinstance(router, AvgKConfig) and router.descriptor == "subset":
            buffers[f"{prefix}.descriptor_cells"] = subsets_of_cells(
                torch.arange(sffn.num_blocks),
                sffn.block_size,
                router.subset_cells,
                seed=sffn.seed,
                layer_number=number,
            )
    return buffers


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = not tensor.is_floating_point() or name.endswith(KEPT_IN_FP32)
    return tensor if kept else tensor.to(dtype)


def write_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """Write safetensors of at most a size, and their index where there are several."""
    try:
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(
            f"--max-shard-size {max_shard_size} is no size; write for example 5GB or 500MB"
        ) from error
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# Configuration and tokenizer


def config_of(
    settings: Settings, architecture: str, tensors: Mapping[str, Tensor], eod: int | None
) -> dict[str, Any]:
    """The content of `config.json`."""
    fields = config_fields(settings, architecture)
    config = AutoConfig.for_model(architecture, **fields, eos_token_id=eod, bos_token_id=None)
    described: dict[str, Any] = config.to_dict()
    embeddings = next(tensor for name, tensor in tensors.items() if "embed" in name)
    described["dtype"] = str(embeddings.dtype).removeprefix("torch.")
    if architecture == SPARSE_FFN:
        name = modeling_sparse_ffn.SparseFFNGPTForCausalLM.__name__
        module = Path(modeling_sparse_ffn.__file__).stem
        described["auto_map"] = {
            "AutoConfig": f"{module}.{modeling_sparse_ffn.SparseFFNGPTConfig.__name__}",
            "AutoModelForCausalLM": f"{module}.{name}",
        }
    else:
        name = CLASSES[architecture].name
    described["architectures"] = [name]
    return described


def generation_config(
    settings: Settings, eod: int | None, vocab_size: int | None
) -> GenerationConfig:
    """Defaults of `generate`: where a text ends, and no id that is padding of the vocabulary."""
    padding = range(vocab_size or settings.args.padded_vocab_size, settings.args.padded_vocab_size)
    return GenerationConfig(
        eos_token_id=eod, max_length=settings.context, suppress_tokens=list(padding) or None
    )


def _tokenizer_of(
    saved: Namespace,
) -> tuple[list[Path], int | None, int | None, list[str]]:
    """The files of the tokenizer, the id that ends a document, the number of ids, and notes."""
    args = Namespace(**vars(saved))
    asked = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    paths: list[Path] = []
    try:
        localize_tokenizer(args)
        tokenizer = load_tokenizer(saved)
    except ConfigError as error:
        return [], None, None, [f"No tokenizer is in this folder: {error}."]
    folder = Path(args.tokenizer_model or "")
    if args.tokenizer_type == "HuggingFaceTokenizer" and folder.is_dir():
        paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    notes = []
    if not paths:
        notes.append(
            f"No tokenizer is in this folder: transformers has no files for {asked}; ids are those "
            "of the run."
        )
    return paths, eod_of(tokenizer), tokenizer.vocab_size, notes
