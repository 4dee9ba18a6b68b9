"""Rules that Megatron states as an assertion, notices late, or not at all: one sentence each.

Inputs: Megatron's namespace before its validation. Outputs: the first rule that is broken.

Design notes: flags of sparse layers are in `megatron_flags.py`, layouts of ranks in `layout.py`.
An error that Megatron raises while it starts, and that is not foreseen here, becomes a sentence as
well (`as_sentence`).
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.transformer.enums import AttnBackend

from megatron_sffn.flags.names import flag_of, typed
from megatron_sffn.utils.errors import ConfigError

ELEMENTWISE_OPTIMIZERS = ("adam", "sgd", "lion")
"""Optimizers that treat the numbers of a table `[B, G, D]` one by one, whatever its shape."""


UNAVAILABLE = {
    "adlr_autoresume": "it asks a service of NVIDIA's clusters; use examples/launch/slurm.sh",
    "checkpoint_activations": "Megatron has renamed it; use --recompute-activations",
    "config_logger_dir": "Megatron 0.19 cannot write a config that holds process groups; "
    "summary.json has the flags",
    "experimental_attention_variant": "its parameters and FLOPs would not be counted; leave it out",
    "fake_process_group": "no rank learns from another with it; leave it out",
    "init_model_with_meta_device": "weights are drawn where they are; leave it out",
    "lazy_mpu_init": "a caller would have to start the ranks; leave it out",
    "multi_latent_attention": "its parameters and FLOPs would not be counted; leave it out",
}
"""Flags (dest) that cannot be used -> why, and what to do."""

GPU_ONLY = (
    "gpu_sniff_test_interval",
    "nccl_ub",
    "optimizer_cuda_graph",
    "record_memory_history",
)
"""Flags (dest) that ask something of a GPU."""

RESILIENCY = ("nvidia_resiliency_ext", "nvidia-resiliency-ext")
TRANSFORMER_ENGINE = ("transformer_engine", "megatron-core[te]")
PACKAGES = {
    "enable_ft_package": RESILIENCY,
    "enable_msc": ("multistorageclient", "multi-storage-client"),
    "fault_injector_num_ranks": RESILIENCY,
    "fault_injector_ranks": RESILIENCY,
    "inprocess_restart": RESILIENCY,
    "log_device_memory_used": ("pynvml", "nvidia-ml-py"),
    "log_straggler": ("pynvml", "nvidia-ml-py"),
    "save_activations_interval": TRANSFORMER_ENGINE,
    "save_dgrads_interval": TRANSFORMER_ENGINE,
    "save_tokens_per_expert_interval": TRANSFORMER_ENGINE,
    "wandb_project": ("wandb", "wandb"),
}
"""Flags (dest) -> the module that Megatron imports for them, and the package that has it."""

FILES = ("nccl_communicator_config_path", "te_precision_config_file")
"""Flags (dest) that name a file to be read."""


def check_megatron_rules(args: Namespace) -> None:
    """Look at flags that do not go together.

    Args:
        args: not validated yet.

    Raises:
        ConfigError: for the first.
    """
    for part in (_parts, _length, _watching, _files, _optimizer, _model):
        for sentence in part(args):
            raise ConfigError(sentence)


def _parts(args: Namespace) -> Iterator[str]:
    """What Megatron lacks here."""
    for dest, why in UNAVAILABLE.items():
        if getattr(args, dest):
            yield f"{typed(flag_of(dest), getattr(args, dest))} is not available: {why}"
    for dest in GPU_ONLY:
        if getattr(args, dest) and args.distributed_backend == "gloo":
            yield (
                f"{typed(flag_of(dest), getattr(args, dest))} needs a GPU, and this run is on "
                "CPUs; leave it out"
            )
    for dest in FILES:
        path = getattr(args, dest)
        if path and not Path(path).is_file():
            yield f"{flag_of(dest)} {path} is no file that can be read; give one"
    if not args.pad_vocab_size:
        yield (
            "--disable-pad-vocab-size is not available, since the embedding is padded to a "
            "multiple; use --make-vocab-size-divisible-by 1"
        )
    backend = args.pipeline_model_parallel_comm_backend
    if backend == "nccl" and args.distributed_backend == "gloo":
        yield (
            "--pipeline-model-parallel-comm-backend nccl needs GPUs, and this run uses gloo; "
            "leave it out"
        )


def _length(args: Namespace) -> Iterator[str]:
    """How long the run is, and how its batch and rate change."""
    if args.train_iters is not None and args.train_iters < 1:
        yield f"--train-iters {args.train_iters} must be at least 1; to evaluate, use --skip-train"
    if args.log_interval < 1:
        yield (
            f"--log-interval {args.log_interval} must be at least 1; a large number logs the first "
            "step alone"
        )
    if args.step_batch_size_schedule and args.train_iters:
        yield (
            "--step-batch-size-schedule counts samples, and with --train-iters Megatron would "
            "schedule the learning rate and the data for a fixed batch; give --train-samples (and "
            "--lr-decay-samples, --lr-warmup-samples) instead of --train-iters"
        )
    unit = "samples" if args.train_samples else "iters"
    total = vars(args)[f"train_{unit}"]
    decay = vars(args)[f"lr_decay_{unit}"] or total
    warmup = vars(args)[f"lr_warmup_{unit}"]
    if decay and warmup >= decay:
        given = f"lr-decay-{unit}" if vars(args)[f"lr_decay_{unit}"] else f"train-{unit}"
        yield (
            f"--lr-warmup-{unit} {warmup} must be less than --{given} {decay}, in which the "
            "learning rate also decays; lower it"
        )
    if args.lr is not None and args.lr_warmup_init > args.lr:
        yield (
            f"--lr-warmup-init {args.lr_warmup_init} must be at most --lr {args.lr}, to which the "
            "warmup raises it; lower it"
        )
    fraction = args.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        yield (
            f"--lr-warmup-fraction {fraction} must be at least 0 and less than 1, since the "
            "learning rate also decays; lower it"
        )


def _watching(args: Namespace) -> Iterator[str]:
    """What looks at the run."""
    if args.profile and not args.use_pytorch_profiler and args.distributed_backend == "gloo":
        yield (
            "--profile asks for NVIDIA's profiler, and this run is on CPUs; add "
            "--use-pytorch-profiler"
        )
    if args.rerun_mode == "report_stats":
        yield (
            "--rerun-mode report_stats is a name that Megatron 0.19 no longer knows; use "
            "validate_results or disabled"
        )
    for dest, (module, package) in PACKAGES.items():
        if getattr(args, dest) and importlib.util.find_spec(module) is None:
            yield (
                f"{typed(flag_of(dest), getattr(args, dest))} needs the package {package}, which "
                f"is not installed; pip install {package}, or leave the flag out"
            )


def _files(args: Namespace) -> Iterator[str]:
    """What is read and written."""
    if args.save and args.save_interval is None:
        yield (
            f"--save {args.save} needs --save-interval N, the steps from one checkpoint to the "
            "next; add it, for example --save-interval 1000 (the last step is saved in any case)"
        )
    if args.pretrained_checkpoint and not Path(args.pretrained_checkpoint).exists():
        yield (
            f"--pretrained-checkpoint {args.pretrained_checkpoint} is not there; give the folder "
            "of a checkpoint"
        )
    if args.use_checkpoint_args:
        yield (
            "--use-checkpoint-args is not available, since the model follows from this command "
            "line; leave it out, and give the flags that the sentences about --load name"
        )
    if not args.perform_initialization and not (args.load or args.pretrained_checkpoint):
        yield (
            "--no-initialization leaves the weights undefined without --load; add --load DIR or "
            "leave it out"
        )


def _optimizer(args: Namespace) -> Iterator[str]:
    """The optimizer can train every weight."""
    for dest in ("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2"):
        beta = getattr(args, dest)
        if not 0 <= beta < 1:
            yield f"{flag_of(dest)} {beta} must be at least 0 and less than 1; give a usual one"
    name, is_sparse = args.optimizer, args.sffn_router != "dense"
    if is_sparse and name not in ELEMENTWISE_OPTIMIZERS:
        yield (
            f"--optimizer {name} is not available with sparse layers: Megatron would use it for "
            "two-dimensional weights, and Adam for the tables of blocks, which are most of the "
            "model; use --optimizer adam"
        )
    if name not in ("adam", "sgd") and importlib.util.find_spec("emerging_optimizers") is None:
        yield (
            f"--optimizer {name} needs the package emerging-optimizers, which is not installed; "
            "pip install emerging-optimizers, or use --optimizer adam"
        )
    if name == "sgd" and args.use_distributed_optimizer:
        yield (
            "--optimizer sgd is not available with --use-distributed-optimizer, which shards the "
            "state of Adam; leave one out"
        )
    shards = args.use_distributed_optimizer or name == "dist_muon"
    if name not in ("adam", "sgd") and shards and args.distributed_backend == "gloo":
        yield (
            f"--optimizer {name} shards whole matrices over ranks, and gathers parts of unequal "
            "size, which gloo cannot; use --optimizer muon without --use-distributed-optimizer"
        )


def _model(args: Namespace) -> Iterator[str]:
    """The model can be built of Megatron's modules."""
    if args.init_method_xavier_uniform:
        yield (
            "--init-method-xavier-uniform is not available: Megatron 0.19 sets with it what its "
            "config does not have; leave it out, or set --init-method-std"
        )
    if args.attention_backend is AttnBackend.local:
        yield (
            "--attention-backend local is not available: it goes with a --spec of Megatron's; use "
            "--transformer-impl local"
        )
    if not 0 < args.rotary_percent <= 1:
        yield (
            f"--rotary-percent {args.rotary_percent} is not a share of a head's channels; give a "
            "number above 0, and at most 1"
        )
    if args.kv_channels and args.position_embedding_type == "rope":
        turned = int(args.kv_channels * args.rotary_percent)
        if turned < 2:
            yield (
                f"--kv-channels {args.kv_channels} leaves {turned} channels of a head to "
                "--position-embedding-type rope, which turns pairs; use more"
            )
    if args.mtp_num_layers and args.pipeline_model_parallel_size > 1:
        yield (
            f"--mtp-num-layers {args.mtp_num_layers} is not available with "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}, whose last stage "
            "does not get the tokens that the extra layers read; use "
            "--pipeline-model-parallel-size 1"
        )


MEGATRONS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    NameError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What Megatron raises on flags that it does not accept."""


@contextmanager
def as_sentence(doing: str, is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an error of Megatron's own code into one sentence.

    An error without words becomes one only if its line names a setting: any other is not about
    flags, and stays as it is.

    Args:
        doing: what Megatron does not do, such as `accept these flags`.
        is_over: whether an error is no longer about flags, and stays as it is.

    Raises:
        ConfigError: with what the error says, or the line of an assertion without words.
    """
    try:
        yield
    except ConfigError:
        raise
    except MEGATRONS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message, line = " ".join(str(error).split()), frame.line or ""
        is_about_flags = " " in message or re.search(r"\b(args|config)\.", line)
        if is_over() or not is_about_flags or "/megatron/" not in Path(frame.filename).as_posix():
            raise
        reason = (message or line).removeprefix("assert ").rstrip(".")
        reason = re.sub(r"\bargs\.(\w+)", lambda name: flag_of(name[1]), reason)
        raise ConfigError(f"Megatron does not {doing} ({reason}); change them") from error
