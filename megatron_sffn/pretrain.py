"""Trains a model: `torchrun --nproc-per-node N -m megatron_sffn.pretrain` and Megatron's flags.

Inputs: the command line. Outputs: a trained model, or one sentence and exit code 2.

Design notes: everything is imported inside `main`, for two reasons. The process must be adapted
(`patches/`) before Megatron is imported, because Megatron compiles functions at import. And the
processes of Megatron's checkpoint writer import this module at every save, so it has to be light.
"""

from __future__ import annotations

import gc
import os
import socket
import sys

from megatron_sffn.utils.errors import ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

WORLD_SIZES = {
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Environment variable with the number of processes of a job -> the launcher that sets it."""


def main() -> int:
    """Run the command."""
    import logging

    one_rank_without_torchrun()
    silence()
    # Imports make a million objects that stay. Collections would visit them for 0.5 s.
    gc.disable()

    from megatron_sffn.patches import prepare
    from megatron_sffn.patches.registry import dropped_line

    defaults, line = prepare()

    from megatron_sffn.train.arguments import parse
    from megatron_sffn.train.run import train

    gc.freeze()
    gc.enable()
    args = parse(defaults)
    logger = logging.getLogger("megatron_sffn")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.propagate = False  # Megatron configures the root logger
    logger.setLevel(logging.INFO if args.rank == 0 else logging.ERROR)
    for remark in filter(None, (line, dropped_line())):
        logger.info(remark)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    train(args)
    return 0


def one_rank_without_torchrun() -> None:
    """Outside torchrun, make this process a job of one rank.

    Raises:
        ConfigError: if another launcher has started several processes; each of them would train
            alone, and all would write the same files.
    """
    if "RANK" in os.environ:
        return
    for variable, launcher in WORLD_SIZES.items():
        processes = os.environ.get(variable, "")
        if processes.isdecimal() and int(processes) > 1:
            raise ConfigError(
                f"{variable}={processes} says that {launcher} starts {processes} processes, but "
                "torchrun, which makes them one job, is missing (RANK is not set); start one "
                "torchrun per node, as examples/launch/slurm.sh does, or for one rank alone: "
                f"env -u {variable} python -m megatron_sffn.pretrain ..."
            )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(world, MASTER_PORT=str(port))


if __name__ == "__main__":
    run_command(main)
