"""A GPT with sparse feed-forward layers for transformers: every router, every block size.

Inputs: token ids. Outputs: logits. The file needs torch and transformers only: it lies in every
folder that megatron-sffn exports with this architecture, and `trust_remote_code=True` loads it.

A sparse layer has M memory cells, a key and a value each, in B = M/G blocks of G consecutive cells.
A router chooses K blocks for each token, and the layer adds up what their cells compute:
`y = sum of gate_b * f(x keys_b^T) values_b`.

Letters of shapes: T tokens, D hidden size, M cells, B blocks, G cells of a block, K chosen blocks,
C numbers of a key.

Design notes: blocks are computed in one of three forms with the same result up to rounding. A few
tokens gather the cells that they chose; more tokens either compute all cells and mask, which
torch.compile can trace, or loop over the blocks that are chosen.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GATHERED_NUMBERS = 1 << 22
"""Numbers of keys that a forward pass gathers at most; above it, it masks or loops."""
SCRATCH_NUMBERS = 1 << 26
"""Coefficients of cells that are held at a time."""
LOOPED_BLOCK = 16
"""Cells of the smallest block that is worth a matrix product of its own."""


class SparseFFNGPTConfig(PreTrainedConfig):
    """Settings of the model; megatron-sffn's docs/export.md explains them."""

    model_type = "sparse_ffn"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as in transformers)

    vocab_size: int = 256
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 128
    hidden_act: str = "gelu"  # of sparse layers: gelu, relu, squared_relu, swiglu, quick_geglu
    dense_act: str = "gelu"  # of dense layers; also gelu_tanh
    glu_clamp: float | None = None  # of the gate from above, and of what it multiplies
    glu_offset: float = 0.0  # added to what the gate multiplies
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    position_embedding: str = "rope"  # or learned, or none
    max_position_embeddings: int = 2048
    rotary_base: float = 10000.0
    rotary_dim: int = 16
    rotary_interleaved: bool = False
    rotary_interpolation: float = 1.0
    rotary_scaling_factor: float | None = None  # as in Llama 3
    tie_word_embeddings: bool = True
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    sparse_layers: list[int] | None = None
    num_blocks: int = 0
    num_active_blocks: int = 0
    block_size: int = 1
    shared_cells: int = 0
    router: str = "avg-k"
    gate: str = "none"  # or a function of the score; with -chosen divided by their sum
    gate_scale: float = 1.0
    expert_bias: bool = False
    quantile_balancing: bool = False
    num_groups: int = 1
    group_topk: int = 1
    group_score: str = "largest"  # the sum of a group's largest scores, or their mean
    descriptor: str = "mean"  # avg-k
    descriptor_cells: int = 0  # avg-k with descriptor subset
    aggregator: str = "mean"  # vanilla-m, lorkm
    key_rank: int = 0  # lorkm
    gate_network: str = "linear"  # or mlp, attention
    gate_hidden_size: int = 0
    gate_activation: str = "relu"
    product_key_heads: int = 1
    product_key_size: int = 0
    product_key_norm: bool = False
    layer_routers: dict[str, dict[str, Any]] | None = None  # layer -> its fields, where they differ

    def of_layer(self, layer: int) -> "SparseFFNGPTConfig":
        """The settings of one layer, which may have a router of its own."""
        fields = (self.layer_routers or {}).get(str(layer))
        if fields is None:
            return self
        config = copy.copy(self)
        for name, value in fields.items():
            setattr(config, name, value)
        return config


def squared_relu(x: Tensor) -> Tensor:
    """The square of the ReLU."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": squared_relu,
    "swiglu": F.silu,
    "quick_geglu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}
"""Name -> function; of the gate, where the activation has one."""
GATED = ("swiglu", "quick_geglu")
"""Activations of cells that have a gate key beside their key."""


def gated(config: SparseFFNGPTConfig, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of both products, with the clamp and the offset of the model."""
    if config.glu_clamp is not None:
        gate = gate.clamp(max=config.glu_clamp)
        up = up.clamp(-config.glu_clamp, config.glu_clamp)
    return ACTIVATIONS[activation](gate) * (up + config.glu_offset)


def norm(config: SparseFFNGPTConfig, width: int) -> nn.Module:
    """A norm over `width` numbers."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width, eps=config.norm_epsilon)


# Attention


def rotary_cos_sin(config: SparseFFNGPTConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[b, s, rotary_dim]` of rotary position embeddings, in fp32."""
    exponents = torch.arange(0, config.rotary_dim, 2, device=position_ids.device).float()
    frequencies = 1.0 / (config.rotary_base ** (exponents / config.rotary_dim))
    if config.rotary_scaling_factor is not None:
        frequencies = scaled_as_llama_3(frequencies, config.rotary_scaling_factor)
    positions = position_ids[..., None].float() / config.rotary_interpolation
    angles = positions * frequencies
    if config.rotary_interleaved:
        angles = torch.stack((angles, angles), dim=-1).flatten(-2)
    else:
        angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def scaled_as_llama_3(frequencies: Tensor, factor: float) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a smooth change in between."""
    original_length, slow, fast = 8192, 1.0, 4.0
    turns = original_length * frequencies / (2 * math.pi)
    smooth = (turns - slow) / (fast - slow)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(turns < slow, frequencies / factor, frequencies)
    return torch.where((turns >= slow) & (turns <= fast), between, scaled)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first numbers of each head of `[b, heads, s, head_dim]`."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos + other * sin, rest), dim=-1)


def eager_attention(
    module: "SparseFFNAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention `[b, s, heads, head_dim]` from `[b, heads, s, head_dim]`, and its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SparseFFNAttention(nn.Module):
    """Causal self-attention with grouped heads of keys and values."""

    def __init__(self, config: SparseFFNGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.is_causal, self.scaling = True, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.qkv_bias or config.linear_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=config.linear_bias)
        self.q_norm = norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Attend; `x` is `[b, s, D]`."""
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        query = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if cos_sin is not None:
            cos, sin = (part[:, None].to(x.dtype) for part in cos_sin)
            query = rotate(query, cos, sin, self.config.rotary_interleaved)
            key = rotate(key, cos, sin, self.config.rotary_interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, _ = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling
        )
        return self.o_proj(attended.reshape(*x.shape[:-1], -1))


class SparseFFNMLP(nn.Module):
    """A dense feed-forward network."""

    def __init__(self, config: SparseFFNGPTConfig, cells: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.config, self.activation, width = config, activation, config.hidden_size
        self.gate_proj = nn.Linear(width, cells, bias=bias) if activation in GATED else None
        self.up_proj = nn.Linear(width, cells, bias=bias)
        self.down_proj = nn.Linear(cells, width, bias=bias)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """The update of `[..., D]`."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.activation](up))
        return self.down_proj(gated(self.config, self.activation, self.gate_proj(x), up))


# Routers


def topk(scores: Tensor, count: int) -> Tensor:
    """Ids `[T, count]` of the largest of `[T, n]`; of equal scores the lowest id wins."""
    least = scores.topk(count, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    wanted = count - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= wanted))
    return chosen.float().topk(count, dim=1).indices.sort(dim=1).values


class SparseFFNRouter(nn.Module):
    """Base of the routers."""

    has_keys = True
    """True if the cells have keys; False if the router computes their coefficients."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, x: Tensor, blocks: "SparseFFNBlocks", token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Choose the blocks of tokens `[T, D]`.

        Returns:
            Ids `[T, K]`, gates `[T, K]` or None, and the rows `[T, C]` that the keys multiply.
        """
        raise NotImplementedError

    def project_sums(self, sums: Tensor, x: Tensor) -> Tensor:
        """The update `[T, D]` of tokens `[T, D]` from the sums of their blocks `[T, D]`."""
        return sums


class ScoredRouter(SparseFFNRouter):
    """Choose the K blocks of largest score; a method implements `score`."""

    expert_bias: Tensor
    qb_beta: Tensor

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        zeros = torch.zeros(config.num_blocks, dtype=torch.float32)
        if config.expert_bias:
            self.register_buffer("expert_bias", zeros)
        if config.quantile_balancing:
            self.register_buffer("qb_beta", zeros)

    def score(self, x: Tensor, queries: Tensor, blocks: "SparseFFNBlocks") -> Tensor:
        """Scores `[T, B]` in fp32 at least."""
        raise NotImplementedError

    def query(self, x: Tensor) -> Tensor:
        """Rows `[T, C]`."""
        return x

    def forward(
        self, x: Tensor, blocks: "SparseFFNBlocks", token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `SparseFFNRouter.forward`."""
        queries, gate = self.query(x), self.config.gate
        scores = self.score(x, queries, blocks)
        ids = self._choose(scores.detach())
        gates = None
        if gate != "none":
            gates = of_chosen(gate, factors(gate, scores).gather(1, ids))
            gates = gates * self.config.gate_scale
        return ids, gates, queries

    def _choose(self, scores: Tensor) -> Tensor:
        config, selection = self.config, scores
        if config.expert_bias:
            selection = factors(config.gate, scores) + self.expert_bias
        if config.quantile_balancing:
            selection = scores - self.qb_beta
        if config.num_groups > 1:
            by_group = selection.unflatten(1, (config.num_groups, -1))
            if config.group_score == "mean":
                group_scores = by_group.mean(dim=2)
            else:
                count = config.num_active_blocks // config.group_topk
                group_scores = by_group.topk(count, dim=2).values.sum(dim=2)
            groups = topk(group_scores, config.group_topk)
            allowed = torch.zeros_like(group_scores).scatter(1, groups, 1.0) > 0
            selection = by_group.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
        return topk(selection, config.num_active_blocks)


def factors(gate: str, scores: Tensor) -> Tensor:
    """The function of the scores `[..., B]` that a gate has; without a gate the scores."""
    if gate.startswith("sigmoid"):
        return scores.sigmoid()
    if gate.startswith("sqrt-softplus"):
        return F.softplus(scores).sqrt()
    if gate == "relu":
        return scores.relu()
    return scores.softmax(dim=-1) if gate.startswith("softmax") else scores


def of_chosen(gate: str, factors: Tensor) -> Tensor:
    """The gates of chosen blocks from their factors `[..., K]`."""
    if not gate.endswith("-chosen"):
        return factors
    return factors / (factors.sum(dim=-1, keepdim=True) + 1e-20)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ weight.to(dtype).T


class LearnedRouter(ScoredRouter):
    """A gate network, of the methods that choose by one; noise and balancing are for training."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        is_linear = config.gate_network == "linear"
        width = config.hidden_size if is_linear else config.gate_hidden_size
        self.weight = nn.Parameter(torch.empty(config.num_blocks, width))
        self.hidden = None if is_linear else nn.Parameter(torch.empty(width, config.hidden_size))

    def score(self, x: Tensor, queries: Tensor, blocks: "SparseFFNBlocks") -> Tensor:
        """As `ScoredRouter.score`."""
        if self.hidden is None:
            return product(x, self.weight)
        hidden = product(x, self.hidden)
        if self.config.gate_network == "mlp":
            return product(ACTIVATIONS[self.config.gate_activation](hidden), self.weight)
        return product(hidden, self.weight) / math.sqrt(hidden.shape[1])


class AvgKRouter(ScoredRouter):
    """The dot product with a descriptor of each block, which follows from its keys."""

    descriptor_cells: Tensor
    descriptor_average: Tensor
    descriptor_started: Tensor
    _descriptors: Tensor | None = None
    """Descriptors of the current weights; dropped when the module is trained, loaded or moved."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        blocks, cells = config.num_blocks, config.descriptor_cells
        if config.descriptor == "learned":
            self.descriptor_weight = nn.Parameter(torch.empty(blocks, config.block_size))
        elif config.descriptor == "subset":
            self.register_buffer("descriptor_cells", torch.zeros(blocks, cells, dtype=torch.long))
        elif config.descriptor == "ema":
            average = torch.zeros(blocks, config.hidden_size, dtype=torch.float32)
            self.register_buffer("descriptor_average", average)
            self.register_buffer("descriptor_started", average.new_zeros(blocks, 1))

    def train(self, mode: bool = True) -> "AvgKRouter":
        """Set the mode, and forget what was derived from earlier weights."""
        self._descriptors = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._descriptors = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._descriptors = None
        super()._load_from_state_dict(*args, **kwargs)

    def score(self, x: Tensor, queries: Tensor, blocks: "SparseFFNBlocks") -> Tensor:
        """As `ScoredRouter.score`."""
        if self.training or torch.is_grad_enabled():
            return product(x, self.describe(blocks.first_keys()))
        if self._descriptors is None:
            descriptors = self.describe(blocks.first_keys())
            if torch.compiler.is_compiling():
                return product(x, descriptors)
            self._descriptors = descriptors
        return product(x, self._descriptors)

    def describe(self, keys: Tensor) -> Tensor:
        """Descriptors `[B, D]` of keys `[B, G, D]`, in fp32 at least."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        match self.config.descriptor:
            case "max-norm":
                longest = keys.detach().norm(dim=2).argmax(dim=1)
                return keys[torch.arange(len(keys), device=keys.device), longest]
            case "norm-weighted":
                weights = keys.norm(dim=2)
            case "learned":
                weights = self.descriptor_weight.to(keys.dtype).softmax(dim=1)
            case "subset":
                weights = torch.zeros_like(keys[:, :, 0]).scatter(1, self.descriptor_cells, 1.0)
            case "ema":
                average = self.descriptor_average.to(keys.dtype)
                return torch.where(self.descriptor_started > 0, average, keys.mean(dim=1))
            case _:
                return keys.mean(dim=1)
        total = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
        return torch.einsum("bg,bgd->bd", weights, keys) / total


class KeyTableRouter(ScoredRouter):
    """The aggregated activations of a block's cells: vanilla-m, lorkm, top-k-act."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        self.down = None
        if config.key_rank:
            self.down = nn.Parameter(torch.empty(config.key_rank, config.hidden_size))

    def query(self, x: Tensor) -> Tensor:
        """Rows `[T, C]`; projected to the rank of the keys in lorkm."""
        return x if self.down is None else F.linear(x, self.down)

    def score(self, x: Tensor, queries: Tensor, blocks: "SparseFFNBlocks") -> Tensor:
        """As `ScoredRouter.score`."""
        return in_chunks(lambda rows: self._aggregated(rows, blocks), len(blocks.values), queries)

    def _aggregated(self, queries: Tensor, blocks: "SparseFFNBlocks") -> Tensor:
        coefficients = blocks.coefficients(queries, product)
        by_block = coefficients.unflatten(1, (self.config.num_blocks, -1))
        match self.config.aggregator:
            case "mean-abs":
                return by_block.abs().mean(dim=2)
            case "max":
                return by_block.amax(dim=2)
            case "min":
                return by_block.amin(dim=2)
            case "norm":
                return by_block.norm(dim=2)
        return by_block.mean(dim=2)


class HashRouter(SparseFFNRouter):
    """A fixed map from token ids to blocks: rand-hash."""

    map: Tensor

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        shape = (config.vocab_size, config.num_active_blocks)
        self.register_buffer("map", torch.zeros(shape, dtype=torch.int32))

    def forward(
        self, x: Tensor, blocks: "SparseFFNBlocks", token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `SparseFFNRouter.forward`."""
        if token_ids is None:
            raise ValueError(
                "rand-hash routes by token ids: give input_ids, not inputs_embeds alone"
            )
        return self.map[token_ids.reshape(-1)].long(), None, x


class ProductKeyRouter(SparseFFNRouter):
    """The best sums of two halves: pkm and its kin, whose cells have no keys, and peer."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        heads, size = config.product_key_heads, config.product_key_size
        side = math.isqrt(config.num_blocks)
        self.has_keys = config.router == "peer"
        self.query = nn.Parameter(torch.empty(heads * size, config.hidden_size))
        self.subkeys = nn.Parameter(torch.empty(heads, 2, side, size // 2))
        has_bias = config.router != "pkm-ffn"
        self.query_bias = nn.Parameter(torch.empty(heads * size)) if has_bias else None
        has_norm, width = config.product_key_norm, config.hidden_size
        self.query_norm = nn.Parameter(torch.empty(size // 2)) if has_norm else None
        self.output_gate = self.output_projection = None
        if config.router == "memory-plus":
            self.output_gate = nn.Parameter(torch.empty(width, width))
            self.output_projection = nn.Parameter(torch.empty(width, width))

    def forward(
        self, x: Tensor, blocks: "SparseFFNBlocks", token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `SparseFFNRouter.forward`."""
        heads, _, side, half = self.subkeys.shape
        per_head = self.config.num_active_blocks // heads
        dtype = torch.promote_types(x.dtype, torch.float32)
        queries = F.linear(x, self.query, self.query_bias).view(-1, heads, 2, half).to(dtype)
        subkeys = self.subkeys.to(dtype)
        if self.query_norm is not None:
            queries = F.rms_norm(queries, (half,), self.query_norm.to(dtype), 1e-6)
            subkeys = F.rms_norm(subkeys, (half,), eps=1e-6)
        halves = torch.einsum("thpc,hpnc->thpn", queries, subkeys)
        best = topk(halves.detach().reshape(-1, side), min(per_head, side))
        best = best.view(*halves.shape[:3], -1)
        top = halves.detach().gather(3, best)
        sums = top[:, :, 0, :, None] + top[:, :, 1, None, :]
        chosen = topk(sums.flatten(0, 1).flatten(1), per_head).view(-1, heads, per_head)
        rows = best[:, :, 0].gather(2, chosen // best.shape[3])
        columns = best[:, :, 1].gather(2, chosen % best.shape[3])
        scores = halves[:, :, 0].gather(2, rows) + halves[:, :, 1].gather(2, columns)
        match self.config.router:
            case "pkm" | "memory-plus":
                gates = scores.softmax(dim=-1)
            case "pkm-relu":
                gates = scores.relu()
            case "pkm-ffn":
                gates = ACTIVATIONS[self.config.hidden_act](scores)
            case _:
                gates = of_chosen(self.config.gate, factors(self.config.gate, scores))
        rows_of_keys = x if self.has_keys else x[:, :0]
        return (rows * side + columns).flatten(1), gates.flatten(1), rows_of_keys

    def project_sums(self, sums: Tensor, x: Tensor) -> Tensor:
        """As `SparseFFNRouter.project_sums`."""
        if self.output_gate is None or self.output_projection is None:
            return sums
        return F.linear(sums * F.silu(F.linear(x, self.output_gate)), self.output_projection)


ROUTERS: dict[str, type[SparseFFNRouter]] = {
    "avg-k": AvgKRouter,
    **dict.fromkeys(("vanilla-m", "lorkm", "top-k-act"), KeyTableRouter),
    **dict.fromkeys(("switch", "sigma-moe", "softmax-before", "softmax-after"), LearnedRouter),
    **dict.fromkeys(("noisy-top-k", "s-base", "remoe"), LearnedRouter),
    "rand-hash": HashRouter,
    **dict.fromkeys(("pkm", "pkm-relu", "pkm-ffn", "memory-plus", "peer"), ProductKeyRouter),
}
"""Name of a router -> class."""


# Sparse layers


def in_chunks(function: Callable[..., Tensor], numbers_per_token: int, *rows: Tensor) -> Tensor:
    """Apply a function to a few tokens at a time, so that its scratch memory is bounded.

    Under torch.compile it is applied to all tokens, since a graph has no loop.
    """
    tokens = max(1, SCRATCH_NUMBERS // max(1, numbers_per_token))
    if torch.compiler.is_compiling() or len(rows[0]) <= tokens:
        return function(*rows)
    return torch.cat(
        [function(*chunk) for chunk in zip(*(x.split(tokens) for x in rows), strict=True)]
    )


class SparseFFNBlocks(nn.Module):
    """A sparse feed-forward layer: a router, and the keys and values of all cells."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.hidden_act]
        cells, width = config.num_blocks * config.block_size, config.hidden_size
        self.router = ROUTERS[config.router](config)
        has_keys = self.router.has_keys
        key_width = config.key_rank or width
        self.keys = nn.Parameter(torch.empty(cells, key_width)) if has_keys else None
        has_gate = has_keys and config.hidden_act in GATED
        self.gate_keys = nn.Parameter(torch.empty(cells, key_width)) if has_gate else None
        self.values = nn.Parameter(torch.empty(cells, width))
        self.shared_blocks = None
        if config.shared_cells:
            self.shared_blocks = SparseFFNMLP(config, config.shared_cells, config.hidden_act, False)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Coefficients of cells from the products with their gate keys and their keys."""
        return gated(self.config, self.config.hidden_act, gate, up)

    def by_block(self, table: Tensor) -> Tensor:
        """A table of cells `[M, ...]` as `[B, G, ...]`."""
        return table.unflatten(0, (self.config.num_blocks, self.config.block_size))

    def first_keys(self) -> Tensor:
        """The keys `[B, G, C]` that describe the blocks: gate keys where cells have them."""
        keys = self.keys if self.gate_keys is None else self.gate_keys
        assert keys is not None, "blocks without keys are not scored by them"
        return self.by_block(keys)

    def coefficients(self, queries: Tensor, multiply: Callable[..., Tensor] = F.linear) -> Tensor:
        """Coefficients `[T, M]` of all cells."""
        up = multiply(queries, self.keys)
        if self.gate_keys is None:
            return self.activation(up)
        return self.gated(multiply(queries, self.gate_keys), up)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """The update of `[b, s, D]`; `token_ids` is `[b, s]`."""
        x_TD = x.flatten(0, -2)
        ids, gates, queries = self.router(x_TD, self, token_ids)
        # The factor of each chosen block's output.
        gates = torch.ones_like(ids, dtype=x.dtype) if gates is None else gates.to(x.dtype)
        gathered = ids.numel() * self.config.block_size * x.shape[-1]
        if gathered <= GATHERED_NUMBERS:
            update = self._gathered(queries, ids, gates)
        elif torch.compiler.is_compiling() or self.config.block_size < LOOPED_BLOCK:
            update = in_chunks(self._masked, len(self.values), queries, ids, gates)
        else:
            update = self._looped(queries, ids, gates)
        update = self.router.project_sums(update, x_TD).view_as(x)
        return update if self.shared_blocks is None else update + self.shared_blocks(x)

    def _gathered(self, queries: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """Each token multiplies copies of the cells that it chose."""
        weights = gates[:, :, None].expand(-1, -1, self.config.block_size)
        if self.keys is not None:
            up = torch.einsum("tc,tkgc->tkg", queries, self.by_block(self.keys)[ids])
            if self.gate_keys is None:
                up = self.activation(up)
            else:
                keys = self.by_block(self.gate_keys)[ids]
                up = self.gated(torch.einsum("tc,tkgc->tkg", queries, keys), up)
            weights = weights * up
        return torch.einsum("tkg,tkgd->td", weights, self.by_block(self.values)[ids])

    def _masked(self, queries: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """All cells for all tokens; those of other blocks have the factor 0."""
        zeros = gates.new_zeros(len(ids), self.config.num_blocks)
        weights = zeros.scatter_add(1, ids, gates)
        weights = weights[:, :, None].expand(-1, -1, self.config.block_size).flatten(1)
        if self.keys is not None:
            weights = weights * self.coefficients(queries)
        return weights @ self.values

    def _looped(self, queries: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """One block after the other, for the tokens that chose it."""
        update = gates.new_zeros(len(ids), self.values.shape[1])
        values, keys = self.by_block(self.values), None
        if self.keys is not None:
            keys = self.by_block(self.keys)
        for block in ids.unique().tolist():
            tokens, place = (ids == block).nonzero(as_tuple=True)
            rows, weights = queries[tokens], gates[tokens, place, None]
            if keys is not None:
                up = rows @ keys[block].T
                if self.gate_keys is None:
                    up = self.activation(up)
                else:
                    up = self.gated(rows @ self.by_block(self.gate_keys)[block].T, up)
                weights = weights * up
            update.index_add_(0, tokens, weights @ values[block])
        return update


# The model


class SparseFFNDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a sparse or a dense feed-forward layer, each behind a norm."""

    def __init__(self, config: SparseFFNGPTConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SparseFFNAttention(config, layer_idx)
        self.mlp: nn.Module
        if layer_idx in (config.sparse_layers or []):
            self.mlp = SparseFFNBlocks(config.of_layer(layer_idx))
        else:
            cells, bias = config.intermediate_size, config.linear_bias
            self.mlp = SparseFFNMLP(config, cells, config.dense_act, bias)
        self.input_layernorm = norm(config, width)
        self.post_attention_layernorm = norm(config, width)

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """The hidden states `[b, s, D]` after the layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attention_mask, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x), token_ids)


class SparseFFNGPTPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config: SparseFFNGPTConfig
    config_class = SparseFFNGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseFFNDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Biases, prices and averages of the choice are fp32 in a model of half precision, too.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "expert_bias",
        "qb_beta",
        "descriptor_average",
        "descriptor_started",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (SparseFFNRouter, SparseFFNBlocks)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)


class SparseFFNGPTModel(SparseFFNGPTPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.embed_positions = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([SparseFFNDecoderLayer(config, layer) for layer in layers])
        self.norm = norm(config, width)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers; the arguments are those of every decoder in transformers."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(x, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cos_sin = None
        if self.config.position_embedding == "rope":
            cos_sin = rotary_cos_sin(self.config, position_ids)
        elif self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        states = []
        for layer in self.layers:
            states.append(x)
            x = layer(
                x,
                cos_sin=cos_sin,
                attention_mask=mask,
                past_key_values=past_key_values,
                token_ids=input_ids,
            )
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
        )

    @staticmethod
    def _positions(x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Positions `[b, s]`; padding on the left does not count."""
        length = x.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        start = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(length, device=x.device) + start)[None]


class SparseFFNGPTForCausalLM(SparseFFNGPTPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SparseFFNGPTConfig) -> None:
        super().__init__(config)
        self.model = SparseFFNGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, s, V]`, and the loss where `labels` are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
