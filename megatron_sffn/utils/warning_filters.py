"""Silences warnings of libraries that a user cannot act on.

Call `silence()` before torch is imported.
"""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Silence Megatron's and torch's warnings about absent libraries and renamed functions."""
    # Megatron warns of every accelerator library that is absent.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # torch warns about names that Megatron still uses, and that CUDA's compiler is absent.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
