"""Silences warnings of libraries that a user cannot act on.

Call `silence()` before torch is imported.
"""

from __future__ import annotations

import logging
import warnings

DEPRECATING = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.torch",
)
"""Loggers that announce with every run that Megatron's GPT and its way to save will be dropped."""


def silence() -> None:
    """Silence Megatron's and torch's warnings about absent libraries and renamed functions."""
    # Megatron warns of every accelerator library that is absent.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # torch warns about names that Megatron still uses, and that CUDA's compiler is absent.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Megatron asks for pinned memory in every data loader, with a GPU or without.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    for name in DEPRECATING:
        logging.getLogger(name).addFilter(_is_no_deprecation)


def _is_no_deprecation(record: logging.LogRecord) -> bool:
    return "deprecated" not in record.getMessage().lower()
