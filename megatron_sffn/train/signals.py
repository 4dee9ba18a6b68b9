"""Signals after which a run saves a checkpoint and exits.

Design notes: Megatron's handler of `--exit-signal`, which saves and exits with code 0, is always
on; it costs one small all-gather per step. Here it handles SIGTERM, SIGUSR1 and SIGUSR2, since
schedulers differ in the signal that they send as a warning.
"""

from __future__ import annotations

import signal
from argparse import Namespace

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of schedulers that stop a job, or warn that they will."""


def exit_on_signals(args: Namespace) -> None:
    """Install Megatron's handler of one signal for all `SIGNALS`; after `set_global_variables`."""
    handler = signal.getsignal(args.exit_signal)
    for number in SIGNALS:
        signal.signal(number, handler)
