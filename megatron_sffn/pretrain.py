"""The entry point: `torchrun --nproc-per-node N -m megatron_sffn.pretrain` with Megatron's flags.

Enters: the command line. Leaves: a trained model, or one sentence and exit code 2.

Choice: everything is imported inside `main`. The platform must be adapted before Megatron is
imported (it compiles functions at import), and Megatron's checkpoint writer starts processes that
import this module again at every save: it has to be light.
"""

from __future__ import annotations

from megatron_sffn.errors import run_command


def main() -> int:
    """Run the command."""
    import logging
    import warnings

    # Of the accelerator libraries that are absent; `platform_line` says what runs instead.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

    from megatron_sffn.platforms import cpu

    defaults = {}
    if cpu.is_host():
        cpu.install()
        defaults = dict(cpu.HOST_FLAGS.values())

    from megatron_sffn.arguments import parse
    from megatron_sffn.training import train

    args = parse(defaults)
    if defaults and args.rank == 0:
        print(f"no CUDA device: training on the CPU with {' '.join(cpu.HOST_FLAGS)}", flush=True)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    train(args)
    return 0


if __name__ == "__main__":
    run_command(main)
