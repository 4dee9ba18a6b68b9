"""Loads exports in a process of unmodified transformers, where our package and Megatron are absent.

The tests' own process stands in for a GPU, in which transformers 5.23 leaves the buffers of rotary
embeddings uninitialised.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

COMPARE = """
import sys, warnings
sys.modules["megatron_sffn"] = sys.modules["megatron"] = None  # an import of them is an error
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # absent shared experts
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    ids, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5, msg=folder)
print("equal")
"""


def check_with_transformers_alone(
    folder: Path, models: Mapping[Path, tuple[Tensor, Tensor]]
) -> None:
    """Compare logits.

    Args:
        folder: working folder of the process.
        models: folder of an export of a stock class -> ids, and the logits that it must have.
    """
    for model, expected in models.items():
        torch.save(expected, model / "expected.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", COMPARE, *map(str, models)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
