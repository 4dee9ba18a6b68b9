"""Trains a small GPT with sparse layers on the bytes of a file, in plain PyTorch, without Megatron.

Inputs: a text file and the name of a router. Outputs: losses on the terminal.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sffn import SparseFFNConfig, StandaloneSparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.standalone import finish_step

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, BYTES = 2, 128, 4, 128, 16, 256


class Layer(nn.Module):
    """Attention, then a sparse feed-forward layer of 256 active cells out of 1,024."""

    def __init__(self, number: int, router: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        numbers = ROUTERS[router].test_numbers
        # Product keys choose cells, or of a square number of blocks.
        size = 1 if numbers.single_cells else 16 if numbers.square_blocks else 32
        sffn = SparseFFNConfig(
            active_cells=256, router=ROUTERS[router](), block_size=size, expansion=4
        )
        self.ffn = StandaloneSparseFFN(
            WIDTH, sffn, layer_number=number, num_layers=LAYERS, vocab_size=BYTES
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Update hidden states `[b, s, D]`; the router `rand-hash` reads the ids."""
        q, k, v = self.qkv(self.norm1(x)).view(*ids.shape, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x), ids)


class GPT(nn.Module):
    """From bytes `[b, s]` to logits of the next byte `[b, s, 256]`."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer(number + 1, router) for number in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits."""
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, ids)
        return self.head(self.norm(x))


def main() -> None:
    """Train, and print the loss on the last tenth of the file, which training does not read."""
    parser = argparse.ArgumentParser(description="Train a small GPT with sparse layers on bytes.")
    parser.add_argument("--text", type=Path, required=True, help="any file of some 100 kB or more")
    parser.add_argument("--router", choices=[r for r in ROUTERS if r != "dense"], default="avg-k")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(1234)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long().to(device)
    train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    model = GPT(args.router).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def loss_of(text: Tensor) -> Tensor:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,)).tolist()
        chunks = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        return F.cross_entropy(model(chunks[:, :-1]).flatten(0, 1), chunks[:, 1:].flatten())

    for step in range(args.steps + 1):
        if step % max(1, args.steps // 5) == 0:
            model.eval()
            with torch.no_grad():
                loss = sum(loss_of(held_out).item() for _ in range(4)) / 4
            print(f"step {step}: held-out loss {loss:.3f} per byte", flush=True)
            model.train()
        optimizer.zero_grad()
        loss_of(train).backward()
        finish_step(model)
        optimizer.step()


if __name__ == "__main__":
    main()
