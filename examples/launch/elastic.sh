#!/usr/bin/env bash
# One training on nodes that may fail, leave and join. Start the same command on each of them:
#
#   NNODES=2:4 MASTER_ADDR=node-a RUN_ID=mine examples/launch/elastic.sh \
#       --save /shared/mine --load /shared/mine --save-interval 500 --num-layers 12 ...
#
# Inputs: the flags of `python -m megatron_sffn.pretrain`, --save and --load among them, and
#   NNODES         how many nodes, or the fewest and the most: 2:4
#   MASTER_ADDR    a name or address of one node that every node can reach
#   MASTER_PORT    a free port of that node, the same on every node (default: 29500)
#   RUN_ID         a name of this training, the same on every node
#   MAX_RESTARTS   how often failed ranks are restarted (default: 3)
#   GPUS_PER_NODE  ranks of this node (default: its GPUs; without GPUs, its cores)
#   NODE_ADDR      a name or address of this node, if other nodes cannot resolve its host name
#   IS_MASTER      true or false, if MASTER_ADDR is no name or address of the host itself
# and the environment of nccl.env or gloo.env. Outputs: those of the training.
# After a failure, and when the number of nodes has changed, all ranks restart and resume from the
# newest checkpoint: their layout and the batch size must fit every number of nodes.
set -euo pipefail

fail() {
    printf 'error: %s; see the head of %s\n' "$1" "$0" >&2
    exit 2
}

for name in NNODES MASTER_ADDR RUN_ID; do
    [ -n "${!name:-}" ] || fail "$name is not set"
done
for flag in --save --load; do
    case " $* " in
    *" $flag "* | *" $flag="*) ;;
    *) fail "$flag is not among the flags, but ranks that start again go on from a checkpoint" ;;
    esac
done

# Without this, torch 2.13 gives restarted ranks the store of the killed ones, with dead addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$RUN_ID" \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    ${IS_MASTER:+--rdzv-conf "is_host=$IS_MASTER"} --max-restarts "${MAX_RESTARTS:-3}" \
    --nproc-per-node "${GPUS_PER_NODE:-auto}" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    -m megatron_sffn.pretrain "$@"
