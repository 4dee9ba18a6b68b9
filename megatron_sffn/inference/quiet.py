"""Keeps stdout free for results while Megatron and lm-eval print."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator

from megatron_sffn.utils.errors import ConfigError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Megatron prints from stdout, which is for results; on an error, print it."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of a load in one process
            yield
    except ConfigError:
        raise
    except BaseException:
        print(output.getvalue(), file=sys.stderr, flush=True)
        raise
