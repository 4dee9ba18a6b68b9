"""Trains a small GPT with sparse layers in a loop of plain PyTorch: no Megatron model, no ranks.

Inputs: a text file, read as bytes. Outputs: losses. Run: `python examples/library/train.py FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sffn import SparseFFN, SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.nn.layer import end_step
from megatron_sffn.nn.routers import AvgKConfig, RandHashConfig, SwitchConfig

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 8
ROUTERS = {"avg-k": AvgKConfig(), "switch": SwitchConfig(), "rand-hash": RandHashConfig()}


def sparse_config(router: str) -> SparseFFNTransformerConfig:
    """The config of the sparse layers: 16 blocks of 32 cells, of which a token uses 4."""
    sffn = SparseFFNConfig(active_cells=128, router=ROUTERS[router], block_size=32, expansion=4)
    # The auxiliary loss has a coefficient here, and is in no line of the loop: a layer attaches it
    # to its output, and `loss.backward()` adds its gradient.
    balanced: dict[str, Any] = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
    }
    return SparseFFNTransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        add_bias_linear=False,
        sffn=sffn,
        **(balanced if router == "switch" else {}),
    )


class Block(nn.Module):
    """Causal attention and a sparse layer, each after a norm and with a residual."""

    def __init__(self, config: SparseFFNTransformerConfig, number: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = SparseFFN(config, layer_number=number)  # the number seeds its weights

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Update hidden states `[b, s, D]` of the input ids `[b, s]`."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        # The layer has Megatron's order, [s, b, D]; `padding_mask` brings ids to routers by hash.
        update, _ = self.ffn(self.norms[1](x).transpose(0, 1), padding_mask=ids)
        return x + update.transpose(0, 1)


class GPT(nn.Module):
    """A language model of bytes."""

    def __init__(self, config: SparseFFNTransformerConfig) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(config, number + 1) for number in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next bytes of `[b, s]`."""
        x = self.embedding(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, ids)
        return self.head(x)


def train(text: bytes, router: str, steps: int, device: str = "cpu") -> list[float]:
    """Train a model; returns the loss of every step."""
    torch.manual_seed(1234)
    data = torch.tensor(list(text), device=device)
    model = GPT(sparse_config(router)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), device=device)
        chunks = data[starts + torch.arange(CONTEXT + 1, device=device)]
        logits = model(chunks[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), chunks[:, 1:].flatten())
        loss.backward()
        end_step(model)  # for descriptors that average tokens; the others do nothing here
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 50 == 0:
            print(f"step {step:4d}  loss {losses[-1]:.3f}", flush=True)
    return losses


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train a small GPT with sparse layers.")
    parser.add_argument("file", type=Path, help="text to train on")
    parser.add_argument("--router", choices=list(ROUTERS), default="avg-k")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args.file.read_bytes(), args.router, args.steps, args.device)


if __name__ == "__main__":
    main()
