"""Writes a checkpoint of ours from a Hugging Face folder, or from a dense checkpoint.

Inputs: the folder of a model of `model_flags.IMPORTED`, or of a run. Outputs: a checkpoint in the
torch_dist format, which commands and training load on every layout, with the flags of the model
and its tokenizer in it.

Design notes:
- Flags, configuration and tokenizer are checked before Megatron starts, and all tensors before
  anything is written. The model is built on one rank by `inference/model.py`, takes the weights by
  the names in its sharded state, and is saved by Megatron's own functions into a folder that is
  renamed as a whole.
- The iteration is 1, since Megatron does not load iteration 0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import (
    _build_sharded_state_dict_metadata,
    _clean_metadata_for_serialization,
    generate_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sffn.checkpoints.files import TRACKER, iteration_folder
from megatron_sffn.checkpoints.pickle_scan import without
from megatron_sffn.checkpoints.tensors import by_layer
from megatron_sffn.checkpoints.tensors import read_tensors as read_checkpoint
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.hf import dense_to_sparse, export, model_folder
from megatron_sffn.hf.dense_to_sparse import DenseToSparse
from megatron_sffn.hf.filler import Filler
from megatron_sffn.hf.model_flags import (
    check_exact,
    check_known,
    flags_of_fields,
    known_architecture,
)
from megatron_sffn.hf.names import SPARSE_FFN, to_checkpoint
from megatron_sffn.hf.settings import Settings, settings_of
from megatron_sffn.inference.checkpoint_args import find_checkpoint, model_flags, parse_flags
from megatron_sffn.inference.model import build_model, finish, initialize
from megatron_sffn.inference.options import DTYPES, LAYOUT_FLAGS
from megatron_sffn.inference.quiet import quiet
from megatron_sffn.utils.atomic_files import atomic_folder
from megatron_sffn.utils.errors import ConfigError

ITERATION = 1

DTYPE_NAMES = {dtype: name for name, dtype in export.DTYPES.items()}

OF_SPARSE_LAYERS = frozenset(
    f"--sffn-{name}"
    for name in ("router", "layers", "block-size", "active-cells", "expansion", "shared-blocks")
)
"""Flags that a dense model has for nothing."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was imported.

    Args:
        architecture: `model_type` of the folder; None for a checkpoint.
        flags: of the model.
        parameters: elements of all tensors.
        notes: what the user should know, in sentences.
    """

    architecture: str | None
    flags: list[str]
    parameters: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that was read.

    Args:
        flags: of the model, its tokenizer and its dtype.
        args: of these flags, with the rows of the embedding.
        settings: of these arguments.
        tensors: by the names of the checkpoint, every layer by itself.
        notes: for the user.
    """

    flags: list[str]
    args: Namespace
    settings: Settings
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def import_model(
    save: Path,
    *,
    model: Path | None = None,
    load: Path | None = None,
    step: int | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    sparse: DenseToSparse | None = None,
    flags: Sequence[str] = (),
) -> Imported:
    """Write a checkpoint.

    Args:
        save: folder of the new checkpoint.
        model: a Hugging Face folder.
        load: in place of `model`, the folder of a run.
        step: iteration of the run; None for the one that training would load.
        tokenizer: folder of the tokenizer, if the model's folder has none.
        dtype: key of `DTYPES`; None for the dtype of the weights.
        sparse: makes a dense model sparse.
        flags: further flags of the model, such as `--sffn-aggregator max`.

    Raises:
        ConfigError: if the model cannot be imported exactly; nothing is written.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ConfigError(f"--save {save} exists; give another folder, or remove it")
    if model is not None:
        architecture, read = _read_folder(model, tokenizer, dtype, flags if sparse is None else ())
    else:
        assert load is not None
        architecture, read = None, _read_run(load, step, tokenizer, dtype)
    if sparse is not None:
        read = _made_sparse(read, sparse, flags)
    elif load is not None:
        raise ConfigError(
            f"--load {load} is a checkpoint already; give --sffn-router to make a dense one "
            "sparse, or --model for a Hugging Face folder"
        )
    parameters = _save(read, save, sparse)
    return Imported(
        architecture=architecture, flags=read.flags, parameters=parameters, notes=read.notes
    )


# Reading


def _parse(flags: list[str]) -> Namespace:
    return parse_flags(flags, Namespace(**dict.fromkeys(LAYOUT_FLAGS, 1)))


def _read_folder(
    folder: Path, tokenizer: Path | None, dtype: str | None, further: Sequence[str]
) -> tuple[str, Model]:
    """A Hugging Face folder."""
    config = model_folder.read_config(folder)
    check_known(config["model_type"])
    architecture, fields = known_architecture(model_folder.complete_config(config))
    flags = flags_of_fields(architecture, fields)
    rows, notes = fields["vocab_size"], []
    tokenizer_flags, args = _with_tokenizer(flags, folder, tokenizer, rows, further)
    if tokenizer_flags[1] == "NullTokenizer":
        notes.append(
            f"{folder} has no tokenizer, so that the model reads and gives ids alone; "
            "--tokenizer-model names one"
        )
    settings = settings_of(args)
    check_exact(architecture, fields, settings)
    tensors = model_folder.read_tensors(folder)
    if fields["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
        tensors.pop("embed_out.weight", None)
    if architecture == SPARSE_FFN:
        _take_derived(tensors, settings)
    elif architecture == "glm4_moe" and _is_biased(tensors):
        flags.append("--moe-router-enable-expert-bias")
        further = ["--moe-router-enable-expert-bias", *further]
    stored = tensors_dtype(tensors)
    flags = [*flags, *tokenizer_flags, *DTYPES[dtype or DTYPE_NAMES[stored]], *further]
    args = _parse(flags)
    args.padded_vocab_size = rows
    settings = settings_of(args)
    renamed = to_checkpoint(tensors, architecture, settings.sizes)
    if not settings.biased:
        renamed = {name: t for name, t in renamed.items() if not name.endswith(".expert_bias")}
    model = Model(flags=flags, args=args, settings=settings, tensors=renamed, notes=notes)
    return str(config["model_type"]), model


def _with_tokenizer(
    flags: list[str], folder: Path, tokenizer: Path | None, rows: int, further: Sequence[str]
) -> tuple[list[str], Namespace]:
    """The flags of a tokenizer, and all arguments with them.

    Raises:
        ConfigError: if the tokenizer has more ids than the embedding has rows.
    """
    if tokenizer is None and not model_folder.has_tokenizer(folder):
        found = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows)]
    else:
        path = (tokenizer or folder).resolve()
        found = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path)]
    args = _parse([*flags, *found, *further])
    with quiet():
        ids = load_tokenizer(args).vocab_size
    if ids > rows:
        raise ConfigError(
            f"the tokenizer in {tokenizer or folder} has {ids} ids, but the embedding has {rows} "
            "rows; give the model's own with --tokenizer-model"
        )
    found += ["--make-vocab-size-divisible-by", str(_divisor(rows, ids))]
    args.padded_vocab_size = rows
    return found, args


def _divisor(rows: int, ids: int) -> int:
    """The smallest divisor of the rows to whose multiple Megatron pads the ids."""
    return next(d for d in range(rows - ids + 1, rows + 1) if rows % d == 0)


def _take_derived(tensors: dict[str, Tensor], settings: Settings) -> None:
    """Take out the buffers that follow from seeds, after a comparison.

    Raises:
        ConfigError: if the seeds are others.
    """
    expected = {} if settings.sffn is None else export.derived_buffers(settings, settings.sffn)
    for name, buffer in expected.items():
        stored = tensors.pop(name, None)
        if stored is not None and not torch.equal(stored.long(), buffer.long()):
            of_hash = "--sffn-hash-seed (or --sffn-hash-shared, or --sffn-hash-balance)"
            flag = of_hash if "map" in name else "--seed"
            raise ConfigError(
                f"{name} is not drawn with the default seed, and the folder does not say with "
                f"which; give the {flag} of its run"
            )


def _is_biased(tensors: dict[str, Tensor]) -> bool:
    biases = [t for name, t in tensors.items() if name.endswith("e_score_correction_bias")]
    return any(bool(bias.any()) for bias in biases)


def tensors_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The dtype of the weights, which is that of the embedding.

    Raises:
        ConfigError: if it is none that we train.
    """
    dtype = next((t.dtype for name, t in tensors.items() if "embed" in name), torch.float32)
    if dtype not in DTYPE_NAMES:
        raise ConfigError(
            f"the weights are {str(dtype).removeprefix('torch.')}; give a model in "
            f"{', '.join(DTYPES)}"
        )
    return dtype


def _read_run(load: Path, step: int | None, tokenizer: Path | None, dtype: str | None) -> Model:
    """A checkpoint of ours, which is to become sparse."""
    options = Namespace(load=load, ckpt_step=step, sffn_trust_checkpoint=False)
    source = find_checkpoint(options)
    flags = model_flags(source.args)
    if tokenizer is not None:
        flags += ["--tokenizer-model", str(tokenizer.resolve())]
    if dtype is not None:
        flags = [word for word in flags if word not in ("--bf16", "--fp16")] + [*DTYPES[dtype]]
    args = _parse(flags)
    args.padded_vocab_size = source.args.padded_vocab_size
    return Model(
        flags=flags,
        args=args,
        settings=settings_of(args),
        tensors=by_layer(read_checkpoint(source.folder)),
    )


def _made_sparse(dense: Model, how: DenseToSparse, further: Sequence[str]) -> Model:
    """A dense model with sparse layers."""
    flags = [*without(dense.flags, OF_SPARSE_LAYERS), *how.flags(dense.settings), *further]
    args = _parse(flags)
    args.padded_vocab_size = dense.args.padded_vocab_size
    settings = settings_of(args)
    note = dense_to_sparse.check(how, settings)
    return Model(
        flags=flags,
        args=args,
        settings=settings,
        tensors=dense_to_sparse.convert(dense.tensors, how, settings),
        notes=[*dense.notes, note],
    )


# Writing


def _save(read: Model, save: Path, how: DenseToSparse | None) -> int:
    """Build the model, fill it, and save it; returns its number of parameters."""
    initialize(read.args)
    try:
        model = build_model(read.args)
        parameters = Filler(read.tensors, how).fill(unwrap_model(model))
        with atomic_folder(save) as partial, quiet():
            _write(model, read.args, iteration_folder(partial, ITERATION))
            (partial / TRACKER).write_text(str(ITERATION))
    except FileExistsError as error:
        raise ConfigError(f"--save {save} exists; give another folder, or remove it") from error
    except (OSError, CheckpointException) as error:
        raise ConfigError(
            f"--save {save} cannot be written ({error}); give a folder that can"
        ) from error
    finally:
        finish()
    return parameters


def _write(model: Any, args: Namespace, folder: Path) -> None:
    """Save the model as training does, without the state of an optimizer."""
    folder.mkdir()
    metadata = _build_sharded_state_dict_metadata(args)
    state = generate_state_dict(
        args,
        [unwrap_model(model)],
        None,
        None,
        None,
        iteration=ITERATION,
        model_sd_kwargs={"metadata": metadata},
    )
    state["num_floating_point_operations_so_far"] = 0
    dist_checkpointing.save(
        state, str(folder), content_metadata=_clean_metadata_for_serialization(metadata)
    )
