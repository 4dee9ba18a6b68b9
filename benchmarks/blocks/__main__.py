"""See `run.py`."""

from benchmarks.blocks.run import command
from megatron_sffn.utils.errors import run_command

if __name__ == "__main__":
    run_command(command)
