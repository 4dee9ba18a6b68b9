#!/usr/bin/env bash
# The grid of "Towards A Unified View of Sparse Feed-Forward Network in Pretraining Large Language
# Model" (Liu et al., EMNLP 2023, arXiv 2305.13999): a dense model of 355 M parameters, and the same
# model with every sixth feed-forward layer sparse, by router, block size and expansion.
#
#   unified_sffn.sh dense [flags]
#   unified_sffn.sh ROUTER BLOCK_SIZE EXPANSION [flags]
#
# ROUTER        avg-k, vanilla-m, switch, rand-hash; with BLOCK_SIZE 1 also lorkm, pkm-ffn, pkm
# BLOCK_SIZE    4096, 2048, 1024, 256, 64, 1
# EXPANSION     4, 16
# flags         flags of megatron_sffn.pretrain; they override those below
#
# DATA          folder with tokenizer/ and the pairs train_text_document, valid_text_document
# SAVE          folder of checkpoints and results; the same command resumes from it
# NNODES, GPUS_PER_NODE, NODE_RANK, MASTER_ADDR, MASTER_PORT    as for torchrun; one node of 8 GPUs
# TOY=1         5 steps of a small model on mock data and 2 ranks, with or without GPUs
# RUN           a command in place of torchrun: RUN=echo prints the flags,
#               RUN="python tools/accounting.py --ranks 8" counts what they cost
#
# From the paper: 24 layers of width 1,024, k = 4,096 active cells, sequences of 2,048, 60 B tokens,
# GPT-2's vocabulary, the routers, block sizes and expansions.
# Our reading of the paper: which layers are sparse, GELU, and how product keys (pkm-ffn) and low rank
# (lorkm) become an FFN.
# Ours, after GPT-3 Medium (Brown et al. 2020, table 2.1 and appendix B): batch, learning rate,
# schedule, Adam.
set -euo pipefail

ROUTER=${1:-} BLOCK_SIZE=1 EXPANSION=1
if [[ $ROUTER == dense ]]; then
    NAME=dense
    shift
elif (($# >= 3)) && [[ $2 =~ ^[0-9]+$ && $3 =~ ^[0-9]+$ ]]; then
    BLOCK_SIZE=$2 EXPANSION=$3
    NAME=$ROUTER-g$BLOCK_SIZE-E$EXPANSION
    shift 3
else
    echo "error: '$*' does not begin with ROUTER BLOCK_SIZE EXPANSION; write for example" \
        "avg-k 64 16, or dense alone" >&2
    exit 2
fi
DATA=${DATA:-data/corpus} SAVE=${SAVE:-runs/unified-sffn/$NAME}
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}

MODEL=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --ffn-hidden-size 4096
    --seq-length 2048 --max-position-embeddings 2048
    --vocab-size 50257 # for tools/accounting.py; a run asks its tokenizer
    --attention-dropout 0 --hidden-dropout 0
)
MEMORY=(
    --sffn-router "$ROUTER" --sffn-block-size "$BLOCK_SIZE" --sffn-expansion "$EXPANSION"
    --sffn-layers every:6
)
TRAINING=(
    # 114,441 steps of 256 · 2,048 tokens are 60 B; 715 of the steps are GPT-3's warm-up of 375 M.
    --global-batch-size 256 --micro-batch-size 4 --train-iters 114441
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 715
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --bf16
)
LAYOUT=(
    # The model fits a GPU: no token travels. Add --expert-model-parallel-size N to cut the blocks.
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
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
    # All widths are divided, that of the blocks too.
    MODEL+=(
        --num-layers 6 --hidden-size 64 --num-attention-heads 2 --ffn-hidden-size 64
        --seq-length 64 --max-position-embeddings 64
    )
    MEMORY+=(--sffn-block-size $((BLOCK_SIZE < 64 ? 1 : BLOCK_SIZE / 64)))
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
