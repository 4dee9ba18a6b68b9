"""Rules that Megatron states as an assertion, notices late, or does not state at all.

Inputs: Megatron's namespace before Megatron validates it.

Design notes: an error that Megatron raises while it starts, and that no check foresees, becomes a
sentence as well (`as_sentence`).
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

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.names import flag_of
from megatron_sffn.utils.errors import ConfigError

NOT_COUNTED = "its parameters and FLOPs would not be counted"
UNAVAILABLE = {
    "adlr_autoresume": (
        "it asks a service of NVIDIA's clusters",
        "use examples/launch/slurm.sh",
    ),
    "cache_mla_latents": ("it acts on generating text", "leave it out"),
    "checkpoint_activations": ("Megatron has renamed it", "use --recompute-activations"),
    "config_logger_dir": (
        "Megatron 0.19 cannot write a config that holds process groups",
        "summary.json has the flags",
    ),
    "experimental_attention_variant": (NOT_COUNTED, "leave it out"),
    "fake_process_group": ("no rank learns from another with it", "leave it out"),
    "hybrid_override_pattern": ("Megatron has renamed it", "use --hybrid-layer-pattern"),
    "init_model_with_meta_device": ("weights are drawn where they are", "leave it out"),
    "lazy_mpu_init": ("a caller would have to start the ranks", "leave it out"),
}
"""Flags (dest) that cannot be used -> the reason, and the remedy."""

GPU_ONLY = (
    "gpu_sniff_test_interval",
    "gtp_expert_remat_nccl_ub",
    "gtp_remat_nccl_ub",
    "nccl_ub",
    "optimizer_cuda_graph",
    "record_memory_history",
)
"""Flags (dest) that act on a GPU only; two of them are of Megatron's main."""

RESILIENCY = ("nvidia_resiliency_ext", "nvidia-resiliency-ext")
TRANSFORMER_ENGINE = ("transformer_engine", "megatron-core[te]")
PACKAGES = {
    "enable_ft_package": RESILIENCY,
    "enable_msc": ("multistorageclient", "multi-storage-client"),
    "fault_injector_num_ranks": RESILIENCY,
    "fault_injector_ranks": RESILIENCY,
    "fp32_residual_connection": TRANSFORMER_ENGINE,
    "inprocess_restart": RESILIENCY,
    "log_device_memory_used": ("pynvml", "nvidia-ml-py"),
    "log_straggler": ("pynvml", "nvidia-ml-py"),
    "otel_enabled": ("nemo", "nemo-lens"),
    "logit_dtype": TRANSFORMER_ENGINE,
    "save_activations_interval": TRANSFORMER_ENGINE,
    "save_dgrads_interval": TRANSFORMER_ENGINE,
    "save_tokens_per_expert_interval": TRANSFORMER_ENGINE,
    "wandb_project": ("wandb", "wandb"),
}
"""Flags (dest) -> the module that they need, and the package that has it. OpenTelemetry and the
dtype of the logits are of Megatron's main."""

FILES = ("nccl_communicator_config_path", "te_precision_config_file")
"""Flags (dest) whose value is the path of a file to read."""


def unavailable_features(args: Namespace) -> Iterator[Problem]:
    """Features of Megatron that do not work here, or that need a GPU."""
    for dest, (reason, remedy) in UNAVAILABLE.items():
        if value := getattr(args, dest):
            yield Problem(flag_of(dest), value, f"is not available: {reason}", remedy)
    for dest in GPU_ONLY:
        value = vars(args).get(dest)
        if value and args.distributed_backend == "gloo":
            rule = "needs a GPU, and this run is on CPUs"
            yield Problem(flag_of(dest), value, rule, "leave it out")
    for dest in FILES:
        path = getattr(args, dest)
        if path and not Path(path).is_file():
            yield Problem(flag_of(dest), path, "is no file that can be read", "give one")
    if not args.pad_vocab_size:
        yield Problem(
            "--disable-pad-vocab-size",
            None,
            "is not available, since the embedding is padded to a multiple",
            "use --make-vocab-size-divisible-by 1",
        )
    backend = args.pipeline_model_parallel_comm_backend
    if backend == "nccl" and args.distributed_backend == "gloo":
        yield Problem(
            "--pipeline-model-parallel-comm-backend",
            "nccl",
            "needs GPUs, and this run uses gloo",
            "leave it out",
        )


def schedules(args: Namespace) -> Iterator[Problem]:
    """Schedules of batch size and learning rate that do not fit the length of the run."""
    if args.train_iters is not None and args.train_iters < 1:
        yield Problem(
            "--train-iters", args.train_iters, "must be at least 1", "to evaluate, use --skip-train"
        )
    if args.log_interval < 1:
        yield Problem(
            "--log-interval",
            args.log_interval,
            "must be at least 1",
            "a large number logs the first step alone",
        )
    if args.step_batch_size_schedule and args.train_iters:
        yield Problem(
            "--step-batch-size-schedule",
            None,
            "counts samples, and with --train-iters Megatron would schedule the learning rate and "
            "the data for a fixed batch",
            "give --train-samples (and --lr-decay-samples, --lr-warmup-samples) instead of "
            "--train-iters",
        )
    unit = "samples" if args.train_samples else "iters"
    warmup, lr_decay = vars(args)[f"lr_warmup_{unit}"], vars(args)[f"lr_decay_{unit}"]
    decay = lr_decay or vars(args)[f"train_{unit}"]
    if decay and warmup >= decay:
        yield Problem(
            f"--lr-warmup-{unit}",
            warmup,
            f"must be less than --{'lr-decay' if lr_decay else 'train'}-{unit} {decay}, in which "
            "the learning rate also decays",
            "lower it",
        )
    if args.lr is not None and args.lr_warmup_init > args.lr:
        yield Problem(
            "--lr-warmup-init",
            args.lr_warmup_init,
            f"must be at most --lr {args.lr}, to which the warmup raises it",
            "lower it",
        )
    fraction = args.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        yield Problem(
            "--lr-warmup-fraction",
            fraction,
            "must be at least 0 and less than 1, since the learning rate also decays",
            "lower it",
        )


def monitoring(args: Namespace) -> Iterator[Problem]:
    """Profilers and packages that are not installed, or that need a GPU."""
    if args.profile and not args.use_pytorch_profiler and args.distributed_backend == "gloo":
        yield Problem(
            "--profile",
            None,
            "asks for NVIDIA's profiler, and this run is on CPUs",
            "add --use-pytorch-profiler",
        )
    if args.rerun_mode == "report_stats":
        yield Problem(
            "--rerun-mode",
            "report_stats",
            "is a name that Megatron 0.19 no longer knows",
            "use validate_results or disabled",
        )
    for dest, (module, package) in PACKAGES.items():
        value = vars(args).get(dest)
        if value and importlib.util.find_spec(module) is None:
            yield Problem(
                flag_of(dest),
                value,
                f"needs the package {package}, which is not installed",
                f"pip install {package}, or leave the flag out",
            )


def checkpoint_flags(args: Namespace) -> Iterator[Problem]:
    """Saving without an interval, and loading without a checkpoint."""
    if args.save and args.save_interval is None:
        yield Problem(
            "--save",
            args.save,
            "needs --save-interval N, the steps from one checkpoint to the next",
            "add it, for example --save-interval 1000 (the last step is saved in any case)",
        )
    if args.pretrained_checkpoint and not Path(args.pretrained_checkpoint).exists():
        yield Problem(
            "--pretrained-checkpoint",
            args.pretrained_checkpoint,
            "is not there",
            "give the folder of a checkpoint",
        )
    if args.use_checkpoint_args:
        yield Problem(
            "--use-checkpoint-args",
            None,
            "is not available, since the model follows from this command line",
            "leave it out, and give the flags that the sentences about --load name",
        )
    if not args.perform_initialization and not (args.load or args.pretrained_checkpoint):
        yield Problem(
            "--no-initialization",
            None,
            "leaves the weights undefined without --load",
            "add --load DIR or leave it out",
        )


def model(args: Namespace) -> Iterator[Problem]:
    """Models that Megatron's modules cannot build."""
    if args.init_method_xavier_uniform:
        yield Problem(
            "--init-method-xavier-uniform",
            None,
            "is not available: Megatron 0.19 sets with it what its config does not have",
            "leave it out, or set --init-method-std",
        )
    if args.attention_backend is AttnBackend.local:
        yield Problem(
            "--attention-backend",
            "local",
            "is not available: it goes with a --spec of Megatron's",
            "use --transformer-impl local",
        )
    if not 0 < args.rotary_percent <= 1:
        yield Problem(
            "--rotary-percent",
            args.rotary_percent,
            "is not a share of a head's channels",
            "give a number above 0, and at most 1",
        )
    if args.kv_channels and args.position_embedding_type == "rope":
        rotated_channels = int(args.kv_channels * args.rotary_percent)
        if rotated_channels < 2:
            yield Problem(
                "--kv-channels",
                args.kv_channels,
                f"leaves {rotated_channels} channels of a head to --position-embedding-type rope, "
                "which turns pairs",
                "use more",
            )
    rotated_channels = args.qk_pos_emb_head_dim
    if args.multi_latent_attention and rotated_channels % 2:
        yield Problem(
            "--qk-pos-emb-head-dim",
            rotated_channels,
            "is odd, and rotary position embedding turns pairs of channels",
            "give an even number",
        )
    if args.multi_latent_attention and args.qk_layernorm and args.q_lora_rank is None:
        yield Problem(
            "--qk-layernorm",
            None,
            "normalises the latents of queries in --multi-latent-attention, and there are none",
            "add --q-lora-rank",
        )
    groups_layers = args.recompute_method == "uniform" and args.recompute_num_layers != 1
    if args.mtp_num_layers and groups_layers:
        yield Problem(
            "--recompute-num-layers",
            args.recompute_num_layers,
            "is not available with --mtp-num-layers, whose layers Megatron recomputes one by one",
            "use 1",
        )


CHECKS = (unavailable_features, schedules, monitoring, checkpoint_flags, model)


ERRORS_OF_MEGATRON = (
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
"""Errors that Megatron raises on flags that it does not accept."""


@contextmanager
def as_sentence(action: str, is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an error of Megatron's own code into one sentence.

    An error without a message becomes a sentence only if the line that raised it reads a flag. Any
    other error has nothing to do with flags and keeps its traceback.

    Args:
        action: what Megatron cannot do, such as `accept these flags`.
        is_over: tells whether the run has started, after which errors keep their traceback.

    Raises:
        ConfigError: with Megatron's message, or the assertion that failed.
    """
    try:
        yield
    except ConfigError:
        raise
    except ERRORS_OF_MEGATRON as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message, line = " ".join(str(error).split()), frame.line or ""
        is_about_flags = " " in message or re.search(r"\b(args|config)\.", line)
        if is_over() or not is_about_flags or "/megatron/" not in Path(frame.filename).as_posix():
            raise
        reason = (message or line).removeprefix("assert ").rstrip(".")
        reason = re.sub(r"\bargs\.(\w+)", lambda name: flag_of(name[1]), reason)
        raise ConfigError(f"Megatron does not {action} ({reason}); change them") from error
