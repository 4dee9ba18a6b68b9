"""Runs a short training and reads its rate.

Inputs: the flags of `megatron_sffn.pretrain`. Outputs: tokens per second of the median step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import ConfigError


def tokens_per_second(name: object, flags: Sequence[str], *, ranks: int = 1) -> float:
    """The rate of a training in a process of its own, or under torchrun.

    Args:
        name: what an error calls the run.
        flags: its command line, without `--save`.
        ranks: number of ranks, with one thread each.

    Raises:
        ConfigError: if the run fails.
    """
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "megatron_sffn.pretrain"]
        command += [*flags, "--save", folder]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            last_line = (run.stderr.strip() or run.stdout.strip()).splitlines()[-1]
            raise ConfigError(f"{name} did not train ({last_line}); try its flags alone: {command}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return float(summary["tokens_per_second"])
