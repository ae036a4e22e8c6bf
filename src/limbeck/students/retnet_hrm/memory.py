"""A Titans memory: matrices that learn, token by token, to map keys to values while the model runs.

Per head and per chunk j of C tokens of one document, with M and S zero where a document begins:

    y = Q M_{j−1}
    S_j = η S_{j−1} − (2/C) Kᵀ diag(θ) (K M_{j−1} − V),    M_j = (1−α) M_{j−1} + S_j
    u + W_o (σ(W_g u) ⊙ y)

The one idea: chunks are counted from where their document begins, so neither padding nor what else is in a row changes
anything, and what a chunk that is not full yet has gathered is a sum, so a token costs the same wherever it stands.
Queries and keys are of length 1, without which a step of the inner gradient descent could grow.

Source: Titans (arXiv 2501.00663, eq. 8–14), with a matrix as memory; θ per token, α and η their chunk's means.
Shapes: B rows, T positions, D width, H memory heads, W = D/H, C tokens of a chunk, N chunks of a row.
"""

import torch
from torch import nn

from limbeck.students.retnet_hrm.cache import Slot
from limbeck.students.retnet_hrm.chunks import ChunkLayout
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.layers import RowContext

Tensor = torch.Tensor
#: σ of these are θ (the size of a step), α (what is forgotten) and η (what is left of the step before) at first.
RATE_BIASES = (-2.0, -4.0, 0.0)


class RateGates(nn.Module):
    """θ, α and η of each token and head, from its hidden state."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * heads, width))
        self.bias = nn.Parameter(torch.tensor(RATE_BIASES).repeat_interleave(heads))

    def forward(self, u: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, 3, H]`, in float32 at least."""
        exact = torch.promote_types(u.dtype, torch.float32)
        logits = nn.functional.linear(u.to(exact), self.weight.to(exact), self.bias.to(exact))
        return logits.sigmoid().reshape(*u.shape[:-1], 3, -1)


class TitansMemory(nn.Module):
    """The memory with its projections."""

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.chunk, self.head_dim = config.memory_heads, config.memory_chunk, width // config.memory_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.rates = RateGates(width, config.memory_heads)

    def forward(self, u: Tensor, context: RowContext, slot: Slot) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`: u with what was read added to it."""
        context = context.on(u.device)
        layout, cache = context.layout, context.cache
        assert layout is not None
        exact = torch.promote_types(u.dtype, torch.float32)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (projection(u).reshape(*u.shape[:-1], self.heads, -1) for projection in projections)
        q, k, v = (self._laid_out(part.to(exact), layout) for part in heads)
        q, k = (nn.functional.normalize(part, dim=-1, eps=1e-6) for part in (q, k))
        with torch.autocast(u.device.type, enabled=False):
            rates = self._laid_out(self.rates(u).mT, layout)  # [B, N, H, C, 3]
            read, state = self._walk(q, k, v, rates, layout, {} if cache is None else cache.get(slot))
        if cache is not None:
            cache.states[slot] = state
        index = layout.index.clamp_max(layout.chunks * self.chunk - 1)[..., None].expand(-1, -1, u.shape[-1])
        y = read.transpose(2, 3).flatten(3).flatten(1, 2).gather(1, index)
        result: Tensor = u + self.o_proj(self.g_proj(u).sigmoid() * y.to(u.dtype))
        return result

    def _laid_out(self, part: Tensor, layout: ChunkLayout) -> Tensor:
        """`[B, T, H, W]` to `[B, N, H, C, W]`, zeros where a chunk has no token here."""
        rows, _, heads, width = part.shape
        laid = part.new_zeros(rows, layout.chunks * self.chunk + 1, heads, width)
        laid = laid.scatter(1, layout.index[..., None, None].expand(-1, -1, heads, width), part)
        return laid[:, :-1].reshape(rows, layout.chunks, self.chunk, heads, width).transpose(2, 3)

    def _walk(
        self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, layout: ChunkLayout, held: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What each token reads `[B, N, H, C, W]`, and M, S, and the sums of a chunk that is not full yet."""
        shape = (q.shape[0], self.heads, q.shape[-1], q.shape[-1])
        zeros = q.new_zeros(shape)
        memory, step, gradient = held.get("M", zeros), held.get("S", zeros), held.get("G", zeros)
        sums = held.get("rates", q.new_zeros(*shape[:2], 2))
        read = []
        for number in range(layout.chunks):
            fresh, begins, full = (
                mark[:, number, None, None, None] for mark in (layout.fresh, layout.begins, layout.full)
            )
            memory, step = memory.masked_fill(fresh, 0.0), step.masked_fill(fresh, 0.0)
            gradient, sums = gradient.masked_fill(begins, 0.0), sums.masked_fill(begins[..., 0], 0.0)
            keys = k[:, number]
            read.append(q[:, number] @ memory)
            theta = rates[:, number, ..., :1]
            gradient = gradient + (keys * theta).mT @ (keys @ memory - v[:, number])
            sums = sums + rates[:, number, ..., 1:].sum(dim=-2)
            alpha, eta = (sums / self.chunk)[..., None].unbind(-2)
            moved = eta[..., None] * step - (2.0 / self.chunk) * gradient
            memory = torch.where(full, (1.0 - alpha[..., None]) * memory + moved, memory)
            step = torch.where(full, moved, step)
        return torch.stack(read, dim=1), {"M": memory, "S": step, "G": gradient, "rates": sums}
