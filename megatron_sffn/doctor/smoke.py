"""The smoke test: an all-reduce over two ranks, and two steps of a small sparse model.

Inputs: this machine, through torchrun, with a GPU for each rank if it has GPUs. Outputs: a finding.
The ranks run this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_sffn.doctor.findings import Finding, ok, wrong
from megatron_sffn.utils.errors import reason_in, run_command

SECONDS = 600
"""Seconds after which the ranks count as hanging."""

FLAGS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --disable-bias-linear
    --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 64 --mock-data
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 2 --log-interval 1
    --eval-iters 1 --num-workers 0 --sffn-block-size 8 --sffn-expansion 4
"""


def smoke(name: str) -> Finding:
    """Run two ranks, or one rank if there is only one GPU."""
    from megatron_sffn.doctor.packages import torch_build

    ranks = min(len(torch_build()["gpus"]), 2) or 2
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "megatron_sffn.doctor.smoke"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"OMP_NUM_THREADS": "1", **os.environ, **_import_path()},
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            process.communicate()
            remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network that ranks share"
            return wrong(name, f"{ranks} ranks did not end within {SECONDS} s", remedy)
        summaries = list(Path(folder).glob("runs/*/summary.json"))
        if process.returncode or not summaries:
            return wrong(name, reason_in(output), "mend what the message names")
        summary = json.loads(summaries[0].read_text())
    backend = "NCCL" if torch_build()["gpus"] else "gloo"
    seconds = time.monotonic() - start
    return ok(
        name,
        f"{ranks} ranks over {backend}: a sum, and {summary['iterations']} steps of a sparse "
        f"model, validation loss {summary['validation_loss']:.2f}, {seconds:.0f} s",
    )


def _import_path() -> dict[str, str]:
    """The environment with which ranks, which start in another folder, import this package."""
    root = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def main() -> int:
    """One rank."""
    import torch

    gpus = torch.cuda.device_count()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    # torchrun's store would still hold this group's addresses when training asks for its own.
    store = torch.distributed.FileStore("store", world)
    torch.distributed.init_process_group(
        "nccl" if gpus else "gloo", store=store, rank=rank, world_size=world
    )
    total = torch.ones(1, device=device)
    torch.distributed.all_reduce(total)
    assert total.item() == world, (total, world)
    torch.distributed.destroy_process_group()

    from megatron_sffn import pretrain

    sys.argv = ["pretrain", *FLAGS.split(), "--expert-model-parallel-size", str(world)]
    return pretrain.main()


if __name__ == "__main__":
    run_command(main)
