"""A fitted loss surface as plain numbers, which a JSON file can hold.

Inputs: a `Surface`, or its record. Outputs: the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from megatron_sffn.scaling.surface import RANGED, Form, Surface


def as_record(surface: Surface) -> dict[str, Any]:
    """The surface as plain numbers: all that is needed to evaluate it elsewhere."""
    return {
        "form": vars(surface.form),
        "values": surface.values.tolist(),
        "draws": surface.draws.tolist(),
        "residual": surface.residual,
        "ranges": {name: list(bounds) for name, bounds in surface.ranges.items()},
    }


def of_record(record: Mapping[str, Any]) -> Surface:
    """The surface of a record.

    Raises:
        KeyError: if a number is missing.
        TypeError: if something is not of the kind that `as_record` writes.
        ValueError: if the numbers do not fit each other.
    """
    form = Form(**record["form"])
    values = numpy.array(record["values"], dtype=float)
    draws = numpy.array(record["draws"], dtype=float)
    if values.shape != (form.coefficients,) or draws.shape[1:] != values.shape or not len(draws):
        raise ValueError(f"{values.shape} values and {draws.shape} draws do not fit {form}")
    ranges = {name: (float(low), float(high)) for name, (low, high) in record["ranges"].items()}
    return Surface(
        form=form,
        values=values,
        draws=draws,
        residual=float(record["residual"]),
        ranges={name: ranges[name] for name in RANGED},
    )
