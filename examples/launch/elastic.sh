#!/usr/bin/env bash
# One training on nodes that may fail, leave and join. The same command on each of them:
#
#   NNODES=2:4 MASTER_ADDR=node-a RUN_ID=mine examples/launch/elastic.sh \
#       --save /shared/mine --load /shared/mine --save-interval 500 --num-layers 12 ...
#
# Enters: the flags of `python -m megatron_sffn.pretrain`, --save and --load among them, and
#   NNODES         how many nodes, or the fewest and the most: 2:4
#   MASTER_ADDR    a name or address of one of them, that every node can reach
#   MASTER_PORT    a free port of that node, the same on every node (default: 29500)
#   RUN_ID         a name of this training, the same on every node
#   MAX_RESTARTS   how often failed ranks are started again (default: 3)
#   GPUS_PER_NODE  ranks of this node (default: its GPUs; without GPUs, its cores)
#   NODE_ADDR      a name or address of this node, where its host name means nothing to the others
#   IS_MASTER      true or false, where MASTER_ADDR is no name or address of the host itself
# and the environment of nccl.env or gloo.env. Leaves: what the training leaves.
# After a failure, and when the number of nodes has changed, all ranks start again and go on from
# the newest checkpoint: their layout and the batch size must fit every number of nodes.
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

# Else torch 2.13 hands restarted ranks the store of the killed ones, with addresses of nobody.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$RUN_ID" \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    ${IS_MASTER:+--rdzv-conf "is_host=$IS_MASTER"} --max-restarts "${MAX_RESTARTS:-3}" \
    --nproc-per-node "${GPUS_PER_NODE:-auto}" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    -m megatron_sffn.pretrain "$@"
