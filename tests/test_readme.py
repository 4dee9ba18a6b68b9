"""The code of the README runs unchanged in a new process."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.paths import ROOT

CHECKS = """
assert not torch.distributed.is_initialized()
layers = StandaloneSparseFFN(128, sffn), layer
assert all(torch.equal(*pair) for pair in zip(*(layer.parameters() for layer in layers)))
x = torch.randn(2, 32, 128, requires_grad=True)
out = layer(x)
assert out.isfinite().all() and out.abs().sum() > 0
out.sum().backward()
assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in layer.parameters())
"""
MEGATRONS = """
from megatron_sffn import ConfigError, SparseFFN, SparseFFNTransformerConfig
import dataclasses

def config_of(**changes):
    return SparseFFNTransformerConfig(
        num_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        add_bias_linear=False,
        sffn=dataclasses.replace(sffn, **changes),
    )

out, _ = SparseFFN(config_of())(x.transpose(0, 1))
assert torch.equal(out.transpose(0, 1), layer(x))
for change in ({"shared_blocks": 1}, {"backend": "megatron"}):
    try:
        SparseFFN(config_of(**change))
    except ConfigError as error:
        assert "needs Megatron's process groups; call torch.distributed" in str(error), error
    else:
        raise AssertionError(change)
"""


def test_the_library_example_of_the_readme_runs() -> None:
    section = (ROOT / "README.md").read_text().split("### As a library")[1].split("\n## ")[0]
    lines = "".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
    assert "layer = StandaloneSparseFFN(128, sffn)" in lines
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", lines + CHECKS + MEGATRONS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
