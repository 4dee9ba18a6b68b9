"""Mamba and gated delta nets on a machine without CUDA: their kernels in plain torch.

Megatron's modules call kernels of mamba-ssm, causal-conv1d and flash-linear-attention, which run on
a GPU only. Here the same functions are computed by torch's operators, in the dtype of their inputs;
none of these packages is needed then.

Design notes: the scan is the one by chunks of Dao and Gu 2024 (arXiv 2405.21060, section 6):
products within a chunk, and a state that passes from chunk to chunk. So is the gated delta rule
(Yang et al. 2024, arXiv 2412.06464), where a triangular system says what the tokens of a chunk
write. Megatron has a plain function for it, too, which computes in fp32 and solves the system row
by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.patches.registry import Patch, apply


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


class GroupedRMSNorm(torch.nn.Module):
    """RMSNorm of each group of a Mamba layer's channels; arguments as mamba-ssm's."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, group by group."""
        groups = F.rms_norm(
            x.unflatten(-1, (-1, self.group_size)), (self.group_size,), None, self.eps
        )
        return groups.flatten(-2) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """The weight, which tensor-parallel ranks shard."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,  # Megatron's mixer sets it
            dp_cp_group=metadata["dp_cp_group"],
        )


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a causal convolution of each channel.

    Args:
        x: `[b, S, channels]`.
        weight: `[channels, width]`.
        bias: `[channels]`, or None.
    """
    channels, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    convolved = F.conv1d(padded, weight[:, None], bias, groups=channels)
    return F.silu(convolved).transpose(1, 2)


def split_conv_scan(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    decay: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: Tensor | None,
    state_dtype: torch.dtype | None = None,
) -> Tensor:
    """mamba-ssm's `mamba_split_conv1d_scan_combined`, with its arguments in Megatron's order.

    Args:
        projected: the gates, inputs, the two state projections and the time steps of every token,
            `[b, S, 2·heads·headdim + 2·groups·states + heads]`.
        conv_weight: `[channels, width]` of the inputs and the state projections.
        conv_bias: `[channels]`.
        dt_bias: added to the time steps, `[heads]`.
        decay: the negative rates of decay, `[heads]`.
        D: factor of the direct path, `[heads]`.
        chunk_size: tokens that are multiplied at once.
        activation: `silu`.
        headdim: width of a head.
        ngroups: groups of heads that share the state projections.
        norm_before_gate: False.
        seq_idx: None; packed sequences are refused before a run starts.
        state_dtype: dtype of the kernel's states, which this function does not round.

    Returns:
        `[b, S, heads·headdim]`.
    """
    assert activation == "silu" and not norm_before_gate and seq_idx is None
    heads = decay.shape[0]
    inner = heads * headdim
    gate, channels, steps = projected.split([inner, conv_weight.shape[0], heads], dim=-1)
    channels = causal_conv(channels, conv_weight, conv_bias)
    states = (channels.shape[-1] - inner) // 2
    inputs, keys, queries = channels.split([inner, states, states], dim=-1)
    inputs = inputs.unflatten(-1, (heads, headdim))
    keys, queries = (
        tensor.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2)
        for tensor in (keys, queries)
    )
    steps = F.softplus(steps + dt_bias)  # fp32 or wider, as in the kernel
    inputs, keys, queries = (tensor.to(steps.dtype) for tensor in (inputs, keys, queries))
    mixed = scan(inputs * steps[..., None], keys, queries, steps * decay, chunk_size)
    mixed = mixed + D[:, None] * inputs
    return (mixed.flatten(-2) * F.silu(gate)).to(projected.dtype)


def scan(
    inputs: Tensor, keys: Tensor, queries: Tensor, log_decay: Tensor, chunk_size: int
) -> Tensor:
    """A linear recurrence: every head has a state, `state = exp(log_decay)·state + input·keyᵀ`.

    Args:
        inputs: `[b, S, heads, width]`.
        keys: `[b, S, heads, states]`.
        queries: as keys.
        log_decay: `[b, S, heads]`, at most 0.
        chunk_size: tokens that are multiplied at once.

    Returns:
        The products of the states with the queries, `[b, S, heads, width]`.
    """
    length = inputs.shape[1]
    inputs, keys, queries, log_decay = (
        _chunks(tensor, chunk_size) for tensor in (inputs, keys, queries, log_decay[..., None])
    )
    total = log_decay[..., 0].cumsum(dim=-1)
    between = _decay_between(total)
    within = (queries @ keys.transpose(-1, -2) * between) @ inputs
    to_end = (total[..., -1:] - total).exp()
    added = (keys * to_end[..., None]).transpose(-1, -2) @ inputs
    state, before = torch.zeros_like(added[:, :, 0]), []
    for index in range(added.shape[2]):
        before.append(state)
        state = state * total[:, :, index, -1, None, None].exp() + added[:, :, index]
    carried = (queries * total[..., None].exp()) @ torch.stack(before, dim=2)
    return _joined(within + carried, length)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    **options: Any,
) -> tuple[Tensor, None]:
    """fla's `chunk_gated_delta_rule`: a token erases what its key reads, and writes its value.

    Args:
        q: the queries, `[b, S, heads, key width]`.
        k: the keys: as queries, of length 1.
        v: the values, `[b, S, heads, value width]`.
        g: logarithms of the decay, `[b, S, heads]`.
        beta: what part is erased and written, `[b, S, heads]`.
        chunk_size: tokens that are multiplied at once.
        options: of the kernel; packed sequences are refused before a run starts.

    Returns:
        What the queries read, `[b, S, heads, value width]`, and no state.
    """
    assert options["cu_seqlens"] is None and not options["use_qk_l2norm_in_kernel"]
    queries, keys, values, log_decay, beta = (
        _chunks(tensor.to(g.dtype), chunk_size)
        for tensor in (q * q.shape[-1] ** -0.5, k, v, g[..., None], beta[..., None])
    )
    total = log_decay[..., 0].cumsum(dim=-1)
    between = _decay_between(total)
    # Row i: what token i erases of the values that the tokens before it in the chunk have written.
    erased = (beta * keys @ keys.transpose(-1, -2) * between).tril(-1)
    wanted = torch.cat((beta * values, beta * total[..., None].exp() * keys), dim=-1)
    solved = torch.linalg.solve_triangular(erased, wanted, upper=False, unitriangular=True)
    written, of_state = solved.split([values.shape[-1], keys.shape[-1]], dim=-1)
    reads = queries @ keys.transpose(-1, -2) * between
    from_state = queries * total[..., None].exp()
    to_end = keys * (total[..., -1:] - total).exp()[..., None]
    state, outputs = torch.zeros_like(keys[:, :, 0].transpose(-1, -2) @ values[:, :, 0]), []
    for index in range(values.shape[2]):
        values_written = written[:, :, index] - of_state[:, :, index] @ state
        outputs.append(from_state[:, :, index] @ state + reads[:, :, index] @ values_written)
        state = state * total[:, :, index, -1, None, None].exp()
        state = state + to_end[:, :, index].transpose(-1, -2) @ values_written
    return _joined(torch.stack(outputs, dim=2), v.shape[1]).to(v.dtype), None


def _chunks(tensor: Tensor, chunk_size: int) -> Tensor:
    """`[b, S, heads, n]` as `[b, heads, chunks, tokens of a chunk, n]`, with zeros at the end."""
    length = tensor.shape[1]
    chunk_size = min(chunk_size, length)
    padded = F.pad(tensor, (0, 0, 0, 0, 0, -length % chunk_size))
    return padded.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)


def _joined(chunks: Tensor, length: int) -> Tensor:
    """The inverse of `_chunks`."""
    return chunks.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _decay_between(total: Tensor) -> Tensor:
    """The decay from token j to token i of a chunk; 0 if j comes later.

    Args:
        total: sums of the logarithms of the decay, `[..., tokens of a chunk]`.
    """
    size = total.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    # Masked before the exponential, which would overflow for tokens that come later.
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()


def _l2norm(original: Any) -> Callable[[Tensor], Tensor]:
    """fla's `l2norm` of the last axis."""
    return lambda x: x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def _conv_of_fla(original: Any) -> Callable[..., tuple[Tensor, None]]:
    """fla's `causal_conv1d`, which returns a state as well."""

    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **options: Any
    ) -> tuple[Tensor, None]:
        assert activation in ("silu", "swish") and options["cu_seqlens"] is None
        return causal_conv(x, weight, bias), None

    return convolve


def _rows(module: str, *rows: tuple[str, Callable[[Any], Any], str, str]) -> tuple[Patch, ...]:
    """Patches of one module of Megatron's, each given as name, `make`, user, and the kernel."""
    return tuple(
        Patch(
            target=f"megatron.core.ssm.{module}.{name}",
            make=make,
            needed_by=f"megatron.core.ssm.{user}",
            why=f"{kernel} runs on a GPU only",
            until="megatron-core has a plain function for it",
        )
        for name, make, user, kernel in rows
    )


_MIXER = "mamba_mixer.MambaMixer"
_NET = "gated_delta_net.gdn.GatedDeltaNet"
_BASE = "gated_delta_net.common._GDNBase"

PATCHES = (
    *_rows(
        "mamba_mixer",
        ("HAVE_MAMBA_SSM", lambda _: True, _MIXER, "mamba-ssm"),
        ("ExtendedRMSNorm", lambda _: GroupedRMSNorm, _MIXER, "mamba-ssm's gated norm"),
        (
            "mamba_split_conv1d_scan_combined",
            lambda _: split_conv_scan,
            _MIXER,
            "mamba-ssm's scan",
        ),
    ),
    *_rows(
        "gated_delta_net.common",
        ("HAVE_FLA", lambda _: True, _BASE, "flash-linear-attention"),
        ("l2norm", _l2norm, _BASE, "flash-linear-attention's norm"),
    ),
    *_rows(
        "gated_delta_net.gdn",
        ("causal_conv1d", _conv_of_fla, _NET, "flash-linear-attention's convolution"),
        (
            "chunk_gated_delta_rule",
            lambda _: gated_delta_rule,
            _NET,
            "flash-linear-attention's rule",
        ),
    ),
)
"""Every name that is replaced for these layers on a host."""
