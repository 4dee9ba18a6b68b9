"""What the sweep gives to flags that do not take just any value, and what it cannot see."""

VALUES = {
    "--activation-func-clamp-value": "0.01",
    "--adam-beta1": "0.5",
    "--adam-beta2": "0.5",
    "--attention-backend": "unfused",
    "--init-method-std": "0.5",
    "--lr-decay-style": "cosine",
    "--position-embedding-type": "learned_absolute",
    "--rotary-base": "20",
    "--rotary-percent": "0.5",
    "--sffn-gate-activation": "gelu",
    "--window-size": "2,0",
}
"""Flag -> the value that is tried, where a rule from its type does not fit."""

NEEDS = {
    "--decoupled-min-lr": "--decoupled-lr 0.1 --lr-decay-style linear",
    "--lr-wsd-decay-iters": "--lr-decay-style WSD",
    "--lr-wsd-decay-style": "--lr-decay-style WSD --lr-wsd-decay-iters 2",
    "--moe-router-bias-update-rate": "--moe-router-enable-expert-bias",
    "--moe-token-drop-policy": "--moe-expert-capacity-factor 0.5",
    "--num-query-groups": "--group-query-attention",
    "--qk-clip-alpha": "--qk-clip",
    "--qk-clip-threshold": "--qk-clip",
    "--recompute-method": "--recompute-granularity full --recompute-num-layers 1",
    "--recompute-modules": "--recompute-granularity selective",
    "--recompute-num-layers": "--recompute-granularity full --recompute-method uniform",
    "--rope-scaling-factor": "--use-rope-scaling",
    "--sffn-gate-activation": "--sffn-gate-network mlp",
    "--sffn-gate-hidden-size": "--sffn-gate-network mlp",
    "--sgd-momentum": "--optimizer sgd",
}
"""Flag -> flags that it acts with; the run is compared with one that has these alone."""

NO_EFFECT = {
    r"tp-comm|nccl|p2p|ring-exchange|sharp|ucc|symmetric|high-priority|communication|comm-": (
        "it is about messages between ranks"
    ),
    r"fusion|fused|flash|kitchen|te-|grouped-gemm|cuda|graph|fp8|fp4|transformer-engine|offload"
    r"|persist|pin-cpu|deterministic|rng-tracker|bf16|jit|fsdp|hsdp": "it is about GPU kernels",
    r"ckpt|checkpoint|async|persistent|save-|load|strict|replication": (
        "it is about how a checkpoint is written or read"
    ),
    r"profile|log|timing|timer|nvtx|straggler|flight|wandb|tensorboard|barrier|energy|trace": (
        "it is about what is measured, and where that goes"
    ),
    r"parallel|rank|expert-tensor|sequence-parallel|bucket|pad-buckets|gather|reduce|overlap": (
        "it acts on several ranks"
    ),
    r"tokenizer|vocab|merge-file|tiktoken|trust-remote": "a run on NullTokenizer reads no text",
    r"data|mmap|dataloader|index|cache|worker|sampl|seq": "another way to the same batches",
    r"gc|signal|exit|rerun|check|sync|memory|interval|restart|ft-|error-": (
        "it acts at an event that two steps do not have"
    ),
}
"""Pattern of flags -> why a run of two steps on one rank of a host shows no difference."""
