"""The entry point: `torchrun --nproc-per-node N -m megatron_sffn.pretrain` with Megatron's flags.

Enters: the command line. Leaves: a trained model, or one sentence and exit code 2.

Choice: everything is imported inside `main`. The platform must be adapted before Megatron is
imported (it compiles functions at import), and Megatron's checkpoint writer starts processes that
import this module again at every save: it has to be light.
"""

from __future__ import annotations

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
"""Variable in which a launcher that is not torchrun says how many processes it starts -> its name.
"""


def main() -> int:
    """Run the command."""
    import logging

    one_rank_without_torchrun()
    silence()

    from megatron_sffn.patches import prepare

    defaults, line = prepare()

    from megatron_sffn.train.arguments import parse
    from megatron_sffn.train.run import train

    args = parse(defaults)
    ours = logging.getLogger("megatron_sffn")
    ours.addHandler(logging.StreamHandler(sys.stdout))
    ours.propagate = False  # Megatron has its own way with the root of loggers
    ours.setLevel(logging.INFO if args.rank == 0 else logging.ERROR)
    if line:
        ours.info(line)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    train(args)
    return 0


def one_rank_without_torchrun() -> None:
    """Outside torchrun this process is a world of its own.

    Raises:
        ConfigError: if another launcher has started several processes, each of which would train
            alone and write the same files.
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
