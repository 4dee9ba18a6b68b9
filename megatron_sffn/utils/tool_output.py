"""How tools give their results to other programs: as JSON, as CSV, and as a plot.

Inputs: records, or a figure of matplotlib. Outputs: text on stdout, or a PNG file.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sffn.utils.errors import ConfigError


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--csv`, of which one at most can be given."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with all parts of a number")
    form.add_argument("--csv", action="store_true", help="print the same as CSV")


def print_records(records: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print records as JSON, or as CSV with a column for each name in any of them."""
    if as_json:
        print(json.dumps(records, indent=2))
        return
    names = list(dict.fromkeys(name for fields in records for name in fields))
    writer = csv.DictWriter(sys.stdout, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def save_plot(figure: Any, path: Path) -> None:
    """Write the figure of a tool's `--plot`, and close it.

    Args:
        figure: of `matplotlib.pyplot`.
        path: path of the PNG file.

    Raises:
        ConfigError: if the file cannot be written.
    """
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error}); give a path in a folder that is "
            "there, and that ends in .png"
        ) from error
    finally:
        pyplot.close(figure)
