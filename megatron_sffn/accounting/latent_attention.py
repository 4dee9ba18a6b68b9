"""Sizes of multi-latent attention (DeepSeek-V2, arXiv 2405.04434).

Queries, and keys with values, are projected to latents and from them up to all heads. Beside the
part of a key that comes from the latent, all heads share a part with rotary position embedding.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """The widths of multi-latent attention, by the names of Megatron's flags.

    Args:
        q_lora_rank: width of the latents of queries; None for queries without latents.
        kv_lora_rank: width of the latents of keys and values.
        qk_head_dim: width of a head's queries and keys without the rotary part.
        qk_pos_emb_head_dim: width of the rotary part.
        v_head_dim: width of a head's values.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int

    @property
    def query_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    def matrices(self, hidden_size: int, heads: int) -> int:
        """Numbers of all projections."""
        queries = hidden_size * heads * self.query_width
        if self.q_lora_rank is not None:
            queries = self.q_lora_rank * (hidden_size + heads * self.query_width)
        down = hidden_size * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
        up = self.kv_lora_rank * heads * (self.qk_head_dim + self.v_head_dim)
        return queries + down + up + heads * self.v_head_dim * hidden_size

    def up_matrices(self, heads: int) -> int:
        """Numbers of the projections from latents to the heads' queries, keys and values."""
        queries = (self.q_lora_rank or 0) * self.query_width
        return heads * (queries + self.kv_lora_rank * (self.qk_head_dim + self.v_head_dim))
