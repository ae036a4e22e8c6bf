"""The layers of a RetNet-HRM: multi-scale retention, SwiGLU, and stacks of both.

    u += W_o (swish(u' W_g) ⊙ RMSNorm_head(Retention(u')))     u' = RMSNorm(u)
    u += SwiGLU(RMSNorm(u))

Source: RetNet (arXiv 2307.08621, §2.2) with SwiGLU and RMSNorm.
Shapes: B rows, T positions, D width, H heads, K and V the widths of a head's key and value.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from limbeck.students.retnet_hrm.cache import RecurrentCache, Slot
from limbeck.students.retnet_hrm.chunks import ChunkLayout
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.gpu import chunk_retention
from limbeck.students.retnet_hrm.retention import Decays, retention

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowContext:
    """What all layers need to know of a batch of rows.

    Attributes:
        cosines, sines: `[1 or B, T, 1, K/2]` of the rotary angles.
        decays: of the rows.
        layout: of a memory's chunks; None without a memory.
        cache: where states are read and written; None: nothing is carried.
        slot: of the application in hand, without the layer's number.
        halted: `[B, T, 1]` True for tokens that pass the stack unchanged; None: none does.
        finished: all tokens are halted, so that nothing but keys and values is computed.
    """

    cosines: Tensor
    sines: Tensor
    decays: Decays
    layout: ChunkLayout | None = None
    cache: RecurrentCache | None = None
    slot: Slot = ()
    halted: Tensor | None = None
    finished: bool = False

    def at(self, *slot: int) -> "RowContext":
        """The same rows for another application."""
        return replace(self, slot=slot)

    def on(self, device: torch.device) -> "RowContext":
        """The same rows for a layer on another device."""
        return self if self.cosines.device == device else _moved_to(self, device)


def _moved_to(record: Any, device: torch.device) -> Any:
    """A copy of a record with its tensors, and those of records in it, on the device."""
    changes = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device)
        elif is_dataclass(value):
            changes[field.name] = _moved_to(value, device)
    return replace(record, **changes)


def rotary(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[…, T, 1, K/2]` of interleaved rotary angles, θ_j = 10000^(−linspace(0, 1, K/2))."""
    # In float64, because a float32 angle of position 60,000 is off by 0.004; Apple's GPUs have none.
    device = positions.device
    places = positions.cpu() if device.type == "mps" else positions
    exponents = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=places.device)
    angles = (places.double().unsqueeze(-1) * torch.pow(10000.0, -exponents)).unsqueeze(-2)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`[B, T, H, K]` with each pair of neighbours turned by its angle."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)


class RetNetRMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class MultiScaleRetention(nn.Module):
    """Retention with a decay of its own in each head, and a gate on its output."""

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__()
        width, values = config.hidden_size, config.hidden_size * config.value_expansion
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.head_k_dim, self.head_v_dim = config.key_width, config.value_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.g_proj = nn.Linear(width, values, bias=False)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, context: RowContext, slot: Slot) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        keys, values = self._keys(x, context), self._values(x)
        queries = rotated(self.q_proj(x).unflatten(-1, (self.heads, -1)), context.cosines, context.sines)
        found = self._retained(queries, keys, values, context, slot)
        found = nn.functional.rms_norm(found, (self.head_v_dim,), None, self.eps)
        gate = nn.functional.silu(self.g_proj(x))
        result: Tensor = self.o_proj(gate * found.flatten(-2).to(gate.dtype))
        return result

    def push(self, x: Tensor, context: RowContext, slot: Slot) -> None:
        """Let the state take keys and values of tokens whose output nobody needs."""
        keys = self._keys(x, context)
        self._retained(torch.zeros_like(keys), keys, self._values(x), context, slot)

    def _keys(self, x: Tensor, context: RowContext) -> Tensor:
        keys = self.k_proj(x).unflatten(-1, (self.heads, -1)) * self.head_k_dim**-0.5
        return rotated(keys, context.cosines, context.sines)

    def _values(self, x: Tensor) -> Tensor:
        values: Tensor = self.v_proj(x).unflatten(-1, (self.heads, -1))
        return values

    def _retained(self, queries: Tensor, keys: Tensor, values: Tensor, context: RowContext, slot: Slot) -> Tensor:
        # Rotation by float32 angles makes float32 of bfloat16.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        if context.cache is None:
            if context.decays.borders is not None:
                return chunk_retention(queries, keys, values, context.decays.borders)
            return retention(queries, keys, values, context.decays)[0]
        held = context.cache.get(slot)
        outputs, state = retention(queries, keys, values, context.decays, held.get("S"))
        context.cache.states[slot] = {"S": state}
        return outputs


class SwiGLU(nn.Module):
    """W_down (swish(x W_gate) ⊙ x W_up)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class RetNetLayer(GradientCheckpointingLayer):
    """Retention and SwiGLU, each added to what comes in."""

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__()
        self.retention_norm = RetNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.retention = MultiScaleRetention(config)
        self.mlp_norm = RetNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, context: RowContext, slot: Slot) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        context = context.on(hidden.device)
        if context.finished:
            self.retention.push(self.retention_norm(hidden), context, slot)
            return hidden
        out = hidden + self.retention(self.retention_norm(hidden), context, slot)
        out = out + self.mlp(self.mlp_norm(out))
        return out if context.halted is None else torch.where(context.halted, hidden, out)


class RetNetStack(nn.Module):
    """n layers and a norm: f_H or f_L."""

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RetNetLayer(config) for _ in range(config.layers_per_stack))
        self.norm = RetNetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, context: RowContext) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`; tokens that are halted come back normed, and are to be left alone."""
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, context, (*context.slot, number))
        normed: Tensor = self.norm(hidden)
        return normed


def xavier(module: Any, gain: float) -> float:
    """Standard deviation of a linear layer's Xavier initialisation."""
    return float(gain * (2.0 / (module.in_features + module.out_features)) ** 0.5)
