"""`python -m megatron_sffn COMMAND ...`: the same as `megatron-sffn COMMAND ...`."""

from __future__ import annotations

from megatron_sffn.cli import run

if __name__ == "__main__":
    run()
