"""Reads the results of finished runs.

Inputs: folders of runs. Outputs: a `Run` for each folder with a `summary.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.utils.atomic_files import read_json_object
from megatron_sffn.utils.errors import ConfigError

SUMMARY = "summary.json"
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's events in that of a run of a study."""
SUMMARY_COLUMNS = (
    "router",
    "block_size",
    "expansion",
    "active_cells",
    "num_blocks",
    "num_active_blocks",
    "seed",
    "iterations",
    "tokens",
    "validation_loss",
    "validation_perplexity",
    "parameters_total",
    "parameters_active",
    "flops_per_token",
    "sent_bytes_per_token",
    "tokens_per_second",
    "peak_memory_bytes",
    "commit",
)
"""Keys of a summary that are columns of the results."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Args:
        name: the end of its folder's path that tells it from the other runs.
        summary: content of its `summary.json`.
    """

    name: str
    summary: dict[str, Any]

    def setting(self, section: str, name: str) -> Any:
        """A setting of a section of the summary; None if it does not have it."""
        return (self.summary.get(section) or {}).get(name)

    def columns(self) -> dict[str, Any]:
        """The run as a row of a table of results; None where it has no value."""
        tokens, rate = self.summary.get("tokens"), self.summary.get("tokens_per_second")
        return {
            **{name: self.summary.get(name) for name in SUMMARY_COLUMNS},
            "lr": self.setting("optimizer", "lr"),
            "hidden_size": self.setting("model", "hidden_size"),
            "num_layers": self.setting("model", "num_layers"),
            "seconds": tokens / rate if tokens and rate else None,
        }


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in some folders, and the folders without a summary.

    Raises:
        ConfigError: if a folder does not exist, a summary is damaged, or no run has finished.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give the folder of a run (its --save)")
    summaries = {folder: read_json_object(folder / SUMMARY) for folder in dict.fromkeys(folders)}
    finished = [folder for folder, summary in summaries.items() if summary]
    if not finished:
        raise ConfigError(
            f"none of the {len(summaries)} folders has a {SUMMARY}, which a run writes when it "
            "ends; give folders of finished runs"
        )
    names = _short_names(finished)
    runs = [Run(name=names[folder], summary=summaries[folder]) for folder in finished]
    return runs, [folder for folder, summary in summaries.items() if not summary]


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths, of equal length in parts, that differ from each other."""
    parts = {folder: folder.resolve().parts for folder in folders}
    length = 1
    while len({path[-length:] for path in parts.values()}) < len(set(parts.values())):
        length += 1
    return {folder: str(Path(*path[-length:])) for folder, path in parts.items()}
