"""Values that the sweep gives to flags, and flags whose effect the sweep cannot see."""

VALUES = {
    "--activation-func-clamp-value": "0.01",
    "--adam-beta1": "0.5",
    "--adam-beta2": "0.5",
    "--attention-backend": "unfused",
    "--error-injection-rate": "1000000",
    "--ffn-hidden-size": "64",
    "--hidden-size": "64",
    "--hybrid-layer-pattern": "E*",
    "--init-method-std": "0.5",
    "--kv-channels": "8",
    "--linear-attention-freq": "2",
    "--linear-num-key-heads": "8",
    "--linear-num-value-heads": "16",
    "--loss-scale": "1024",
    "--lr-decay-style": "cosine",
    "--lr-warmup-init": "0.001",
    "--mamba-head-dim": "4",
    "--mamba-num-groups": "4",
    "--mamba-num-heads": "16",
    "--max-position-embeddings": "128",
    "--moe-layer-freq": "2",
    "--muon-coefficient-type": "simple",
    "--muon-fp32-matmul-prec": "high",
    "--muon-momentum": "0.5",
    "--no-rope-freq": "2",
    "--position-embedding-type": "learned_absolute",
    "--qk-pos-emb-head-dim": "4",
    "--recompute-granularity": "selective",
    "--recompute-modules": "core_attn",
    "--rope-scaling-factor": "1.5",
    "--rotary-base": "20",
    "--rotary-percent": "0.5",
    "--rotary-seq-len-interpolation-factor": "4",
    "--sffn-gate-activation": "gelu",
    "--sffn-init": "sigma-moe",
    "--sffn-lr-mult": "values:4",
    "--sffn-wd-mult": "values:99",
    "--window-attn-skip-freq": "2",
    "--window-size": "2,0",
}
"""Flag -> the value to try, where a value derived from the flag's type does not fit."""

LATENT = "--multi-latent-attention --init-method-std 0.5"
TENSORBOARD = "--tensorboard-dir events"
MUON = "--optimizer muon"
MAMBA = "--hybrid-layer-pattern ME --mamba-head-dim 8"
DELTA_NET = "--hybrid-layer-pattern GE --swiglu"
NEEDS = {
    "--mamba-head-dim": "--hybrid-layer-pattern ME --mamba-num-groups 1",
    **dict.fromkeys(("--mamba-num-groups", "--mamba-num-heads", "--mamba-state-dim"), MAMBA),
    **dict.fromkeys(
        (
            *("--linear-conv-kernel-dim", "--linear-key-head-dim", "--linear-value-head-dim"),
            *("--linear-num-key-heads", "--linear-num-value-heads"),
        ),
        DELTA_NET,
    ),
    **dict.fromkeys(
        (
            *("--accumulate-allreduce-grads-in-fp32", "--attention-softmax-in-fp32"),
            *("--disable-bf16-reduced-precision-matmul", "--fp32-residual-connection"),
            "--grad-reduce-in-bf16",
        ),
        "--bf16",
    ),
    **dict.fromkeys(
        (
            *("--hysteresis", "--initial-loss-scale", "--loss-scale", "--loss-scale-window"),
            *("--apply-query-key-layer-scaling", "--min-loss-scale"),
        ),
        "--fp16",
    ),
    **dict.fromkeys(
        (
            *("--mup-attn-scale-power", "--mup-base-head-dim", "--mup-base-hidden-size"),
            *("--mup-embedding-mult", "--mup-output-mult"),
        ),
        "--use-mup",
    ),
    "--max-position-embeddings": "--position-embedding-type learned_absolute",
    "--window-attn-skip-freq": "--window-size 2,0",
    "--decoupled-min-lr": "--decoupled-lr 0.1 --lr-decay-style linear",
    **dict.fromkeys(
        (
            *("--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim"),
            *("--v-head-dim", "--rope-type", "--rotary-scaling-factor", "--mla-down-proj-fusion"),
        ),
        LATENT,
    ),
    **dict.fromkeys(("--mscale", "--mscale-all-dim"), f"{LATENT} --rotary-scaling-factor 4"),
    **dict.fromkeys(
        ("--mtp-detach-heads", "--mtp-loss-scaling-factor", "--mtp-use-repeated-layer"),
        "--mtp-num-layers 2",
    ),
    "--log-timers-to-tensorboard": TENSORBOARD,
    "--log-validation-ppl-to-tensorboard": TENSORBOARD,
    "--lr-decay-iters": "--lr-decay-style linear",
    "--lr-warmup-init": "--lr-warmup-iters 1",
    "--lr-wsd-decay-iters": "--lr-decay-style WSD",
    "--lr-wsd-decay-style": "--lr-decay-style WSD --lr-wsd-decay-iters 2",
    "--moe-router-bias-update-rate": "--moe-router-enable-expert-bias",
    "--moe-router-quantile-balancing-ema": "--moe-router-load-balancing-type quantile_balancing",
    "--moe-token-drop-policy": "--moe-expert-capacity-factor 0.5",
    "--muon-coefficient-type": MUON,
    "--muon-extra-scale-factor": MUON,
    "--muon-fp32-matmul-prec": MUON,
    "--muon-momentum": MUON,
    "--muon-nesterov": MUON,
    "--muon-no-split-qkv": MUON,
    "--muon-num-ns-steps": MUON,
    "--muon-scalar-optimizer": MUON,
    "--muon-scale-mode": MUON,
    "--muon-tp-mode": MUON,
    "--non-persistent-ckpt-type": "--non-persistent-save-interval 1",
    "--non-persistent-save-interval": "--non-persistent-ckpt-type global",
    "--num-query-groups": "--group-query-attention",
    "--qk-clip-alpha": "--qk-clip",
    "--qk-clip-threshold": "--qk-clip",
    "--recompute-method": "--recompute-granularity full --recompute-num-layers 1",
    "--recompute-modules": "--recompute-granularity selective",
    "--recompute-num-layers": "--recompute-granularity full --recompute-method uniform",
    "--rope-scaling-factor": "--use-rope-scaling --init-method-std 0.5",
    "--activation-func-clamp-value": "--swiglu",
    "--glu-linear-offset": "--swiglu",
    "--sffn-gate-activation": "--sffn-gate-network mlp",
    "--sffn-gate-hidden-size": "--sffn-gate-network mlp",
    "--sffn-validation-data": "--eval-interval 1",
    "--sgd-momentum": "--optimizer sgd",
    "--start-eval-at-iter": "--eval-interval 1",
    "--use-rope-scaling": "--init-method-std 0.5",
}
"""Flag -> flags that it needs to have an effect; the run to compare with has only these."""

NO_EFFECT = {
    "it is how a run on one rank of a host is anyway": """
        --attention-backend --dataloader-type --disable-bias-linear
        --dist-ckpt-optim-fully-reshardable --distributed-backend --expert-tensor-parallel-size
        --moe-router-dtype --moe-token-dispatcher-type --no-one-logger --no-position-embedding
        --suggested-communication-unit-size --tensor-parallel-num-weight-shards
        --expert-tensor-parallel-num-weight-shards --transformer-impl --use-cpu-initialization
        --use-mcore-models --use-rotary-position-embeddings --num-virtual-stages-per-pipeline-rank
    """,
    "it acts on several ranks": """
        --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
        --ckpt-fully-parallel-save-process-group --data-parallel-random-init
        --ddp-average-in-collective --ddp-bucket-size --ddp-num-buckets
        --ddp-pad-buckets-for-high-nccl-busbw --ddp-reduce-scatter-with-fp32-accumulation
        --disable-align-grad-reduce --disable-gloo-process-groups --disable-symmetric-registration
        --distributed-timeout-minutes --distributed-timeout-seconds-after-init
        --high-priority-a2a-comm-stream --high-priority-stream-groups --local-rank
        --microbatch-group-size-per-virtual-pipeline-stage --muon-tp-mode --no-align-param-gather
        --no-ckpt-fully-parallel-save --no-data-sharding --no-overlap-p2p-communication
        --overlap-grad-reduce --sequence-parallel
        --gtp-remat-reduce-scatter-with-fp32-accumulation
        --sffn-node-size --use-ring-exchange-p2p --use-tp-pp-dp-mapping
    """,
    "it changes time or memory, and no number": """
        --allow-ambiguous-pad-tokens --async-save --ckpt-assume-constant-structure
        --disable-clone-scatter-output-in-embedding
        --disable-stream-ckpt-dequant --dist-ckpt-workers
        --distrib-optim-fully-reshardable-mem-efficient --manual-gc --mid-level-dataset-surplus
        --moe-layer-recompute --no-barrier-with-level-1-timing --no-mmap-bin-files
        --num-dataset-builder-threads --num-workers --recompute-activations --recompute-granularity
        --recompute-modules --sffn-backend
        --sffn-dataloader --sffn-regather --train-sync-interval
        --no-create-attention-mask-in-dataloader --ckpt-pg-tensors-cache-path
        --ckpt-pg-tensors-cache-create
    """,
    "it is about kernels of a GPU": """
        --cross-entropy-fusion-impl --deterministic-mode
        --disable-bf16-reduced-precision-matmul --disable-jit-fuser
        --empty-unused-memory-level --flash-attention-version --no-bias-dropout-fusion
        --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-gradient-accumulation-fusion
        --no-gradient-reduce-div-fusion --no-masked-softmax-fusion --no-persist-layer-norm
        --no-rope-fusion --te-rng-tracker --use-flash-attn --use-fused-weighted-squared-relu
        --use-grouped-gemm-for-dense-mlp --use-grouped-gemm-for-shared-expert
        --use-kitchen-attention --use-te-activation-func --use-transformer-engine-op-fuser
    """,
    "it acts at an event that two steps do not have": """
        --check-for-large-grads --check-for-spiky-loss --loss-scale-window --min-loss-scale
        --disable-ckpt-load-validate-sharding-integrity --dist-ckpt-strictness
        --error-injection-rate --exit-signal --exit-signal-handler
        --exit-signal-handler-for-dataloader --exit-signal-handler-for-training
        --sffn-trust-checkpoint
    """,
    "it is about the contents of files, of which the sweep compares the names": """
        --no-save-optim --no-save-rng
    """,
    "it is about lines that the sweep leaves out of the comparison, such as times and memory": """
        --disable-msc --log-memory-interval --logging-level --timing-log-level --timing-log-option
    """,
    "the model of the sweep has nothing that it acts on": """
        --apply-wd-to-qk-layernorm --enable-experimental --null-tokenizer-eod-id
        --null-tokenizer-pad-id --disable-save-tokenizer-assets
        --ckpt-drop-redundant-extra-state
    """,
    "it scales attention scores down and up again, so that they stay within the range of fp16": """
        --apply-query-key-layer-scaling
    """,
    "every token of the sweep counts, so that means over tokens and batches are equal": """
        --calculate-per-token-loss
    """,
}
"""Reason why a run of two steps on one CPU rank shows no difference -> the flags."""
