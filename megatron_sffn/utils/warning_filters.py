"""What libraries say as they are imported, and nobody can act on.

Enters: nothing. Leaves: this process without these remarks; to be called before torch is imported.
"""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Leave out Megatron's and torch's remarks on what is absent here, or renamed."""
    # Megatron warns of every accelerator library that is absent.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # torch warns of names that Megatron still uses, and looks for CUDA's compiler.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
