"""Takes over finished runs of the study whose learning rates are transferred.

Inputs: a study and its forecasts. Outputs: links from folders of its runs to those of that study.

Design notes: studies share models, such as the dense one. Training is deterministic, so a run with
the same flags has the same losses, and it is trained once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.one_run import FLAGS, flag_values, is_finished, run_folder
from megatron_sffn.study.running.study_file import RUNS, Study


def take_over_runs(study: Study, forecasts: Sequence[Forecast]) -> None:
    """Link the folder of each run that was not begun to a finished run with the same flags."""
    if study.transfer is None:
        return
    folders = [path.parent for path in sorted(study.transfer.glob(f"{RUNS}/*/{FLAGS}"))]
    trained = {_key(shlex.split((folder / FLAGS).read_text())): folder for folder in folders}
    for forecast in forecasts:
        source, link = trained.get(_key(forecast.run.flags)), run_folder(study, forecast)
        if link.is_symlink() and not link.exists():  # the other study's run was removed
            link.unlink()
        if source is not None and is_finished(source, forecast) and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(source, link.parent))


def _key(words: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The flags in an order of their own."""
    return tuple(sorted(flag_values(words).items()))
