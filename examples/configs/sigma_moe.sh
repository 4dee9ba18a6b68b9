#!/usr/bin/env bash
# The models of "Approximating Two-Layer Feedforward Networks for Efficient Transformers"
# (sigma-MoE; Csordas, Irie, Schmidhuber 2023, arXiv 2310.10837), each with its baselines of as many
# parameters: Switch, S-BASE, dense.
#
#   sigma_moe.sh MODEL sigma-moe|switch|s-base|dense [flags]
#
# MODEL         wt-s, wt-s-star, wt-m: WikiText-103; enwik8: its bytes
# flags         flags of megatron_sffn.pretrain; they override those below. Flags also select
#               the paper's other methods: --sffn-router softmax-after, ... (docs/routers.md)
#
# DATA          folder that `python -m examples.data wikitext-103` or `enwik8` made
# SAVE          folder of checkpoints and results; the same command resumes from it
# NNODES, GPUS_PER_NODE, NODE_RANK, MASTER_ADDR, MASTER_PORT    as for torchrun; one node of one GPU
# TOY=1         5 steps of a small model on mock data and 2 ranks, with or without GPUs
# RUN           a command in place of torchrun: RUN=echo prints the flags,
#               RUN="python tools/accounting.py --ranks 1" counts what they cost
#
# From the paper and the authors' code (sweeps/ of github.com/RobertCsordas/moe): every number below,
# except the micro batch, evaluations and checkpoints; their dense wt-s-star clips at 0.1.
# Ours, and theirs in brackets: rotary positions inside a sequence (relative positions with a
# projection and two biases per layer, and attention to the previous sequence); logits without a bias;
# a dense FFN without biases or a dropout of its own; a Switch without dropout of cells; gates of
# Switch and S-BASE that start as Megatron's; an S-BASE that balances (docs/routers.md); bf16 (fp16);
# 8,000 tokens of a byte-level BPE (SentencePiece); 256 bytes (the 204 that occur); Megatron's
# initial weights outside of the sparse layers.
set -euo pipefail

NAME=${1:-} ROUTER=${2:-}
case $NAME in
    wt-s)
        MODEL=(--num-layers 16 --hidden-size 412 --num-attention-heads 10 --seq-length 256)
        MODEL+=(--kv-channels 41 --rotary-percent 0.98) # 40 of the 41: RoPE turns pairs
        MODEL+=(--vocab-size 8000 --make-vocab-size-divisible-by 32 --hidden-dropout 0.1)
        MEMORY=(--sffn-expansion 4 --sffn-entropy-coeff 1e-3)
        SWITCH_LOSS=6.25e-4 S_BASE_ENTROPY=1e-4
        DENSE=2053 BATCH=64 WARMUP=0 CORPUS=data/wikitext
        ;;
    wt-s-star)
        MODEL=(--num-layers 16 --hidden-size 412 --num-attention-heads 10 --seq-length 256)
        MODEL+=(--kv-channels 41 --rotary-percent 0.98)
        MODEL+=(--vocab-size 8000 --make-vocab-size-divisible-by 32 --hidden-dropout 0.1)
        MEMORY=(--sffn-expansion 32 --sffn-entropy-coeff 1e-3 --sffn-block-dropout 0.05)
        SWITCH_LOSS=9.765625e-6 S_BASE_ENTROPY=1e-3
        DENSE=16480 BATCH=64 WARMUP=0 CORPUS=data/wikitext
        ;;
    wt-m)
        MODEL=(--num-layers 18 --hidden-size 1024 --num-attention-heads 16 --seq-length 512)
        MODEL+=(--vocab-size 8000 --make-vocab-size-divisible-by 32 --hidden-dropout 0.2)
        MEMORY=(--sffn-expansion 8 --sffn-entropy-coeff 1e-3 --sffn-block-dropout 0.1)
        SWITCH_LOSS=1.5625e-4 S_BASE_ENTROPY=1e-3
        DENSE=4110 BATCH=64 WARMUP=4000 CORPUS=data/wikitext
        ;;
    enwik8)
        MODEL=(--num-layers 12 --hidden-size 512 --num-attention-heads 8 --seq-length 512)
        MODEL+=(--vocab-size 256 --hidden-dropout 0.1)
        MEMORY=(--sffn-expansion 4 --sffn-entropy-coeff 1e-4 --sffn-block-dropout 0.05)
        SWITCH_LOSS=6.25e-4 S_BASE_ENTROPY=1e-4
        DENSE=2053 BATCH=32 WARMUP=0 CORPUS=data/enwik8
        ;;
    *) ROUTER= ;;
esac
case $ROUTER in
    # N_E experts of G = 128 cells, of which a token uses K = 4: E = N_E / 4.
    sigma-moe) MEMORY+=(--sffn-router sigma-moe --sffn-block-size 128 --ffn-hidden-size 512) ;;
    # A token uses one of B = E experts of 512 cells. The authors' loss is 0.01 times a mean over
    # the tokens of a step and the experts, which is 0.01 / B² times the usual B · Σ P F.
    switch)
        MEMORY+=(--sffn-router switch --sffn-block-size 512 --ffn-hidden-size 512)
        MEMORY+=(--sffn-init sigma-moe-block --sffn-entropy-coeff 0 --sffn-block-dropout 0)
        MEMORY+=(--moe-router-load-balancing-type global_aux_loss)
        MEMORY+=(--moe-aux-loss-coeff "$SWITCH_LOSS")
        ;;
    s-base)
        MEMORY+=(--sffn-router s-base --sffn-block-size 128 --ffn-hidden-size 512)
        MEMORY+=(--sffn-init sigma-moe --sffn-entropy-coeff "$S_BASE_ENTROPY")
        ;;
    dense) MEMORY=(--sffn-router dense --ffn-hidden-size "$DENSE") ;;
    *)
        echo "error: '$*' does not begin with MODEL ROUTER; give wt-s, wt-s-star, wt-m or enwik8," \
            "and sigma-moe, switch, s-base or dense" >&2
        exit 2
        ;;
esac
shift 2
DATA=${DATA:-$CORPUS} SAVE=${SAVE:-runs/sigma-moe/$NAME-$ROUTER}
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1}

MODEL+=(
    --max-position-embeddings 512 --position-embedding-type rope --disable-bias-linear --sffn-relu
    --untie-embeddings-and-output-weights --attention-dropout 0
)
TRAINING=(
    --global-batch-size "$BATCH" --micro-batch-size 8 --train-iters 100000
    --lr 2.5e-4 --min-lr 0 --lr-decay-style cosine --lr-warmup-iters "$WARMUP"
    --weight-decay 0 --clip-grad 0.25
    --bf16
)
LAYOUT=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
INPUT=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer"
    --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document"
    --no-create-attention-mask-in-dataloader
)
OUTPUT=(
    --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard"
    --log-interval 10 --eval-interval 2000 --eval-iters 100
)

if [[ ${TOY:-} ]]; then
    NNODES=1 GPUS_PER_NODE=2
    MODEL+=(--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 64)
    MEMORY+=(--ffn-hidden-size 64)
    case $ROUTER in
        switch) MEMORY+=(--sffn-block-size 64) ;;
        sigma-moe | s-base) MEMORY+=(--sffn-block-size 16) ;;
    esac
    TRAINING+=(
        --global-batch-size 8 --micro-batch-size 4 --train-iters 5 --lr 3e-3 --lr-warmup-iters 1
    )
    INPUT=(
        --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --num-workers 0
        --no-create-attention-mask-in-dataloader
    )
    OUTPUT=(--log-interval 1 --eval-iters 1)
fi

LAUNCH=(
    torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
    -m megatron_sffn.pretrain
)
if [[ ${RUN:-} ]]; then read -ra LAUNCH <<<"$RUN"; fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron's, for overlap under tensor parallelism
exec "${LAUNCH[@]}" "${MODEL[@]}" "${MEMORY[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" "${INPUT[@]}" \
    "${OUTPUT[@]}" "$@"
