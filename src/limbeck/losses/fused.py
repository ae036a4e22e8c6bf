"""Fused linear + cross-entropy + divergence, without the [N, V] logits.

The one idea: walk over chunks of positions; in each, project hidden states to logits, turn the logits in
place into the gradient of the whole loss, and fold that into ∂L/∂hidden and ∂L/∂W at once. The backward
pass only scales. Memory is one chunk of logits (two small blocks beside it), not [N, V] ten times.

    L = (1/n) Σ_valid [ (1−α) CE + α τ² D(p_τ ‖ q_τ) ]

q_τ is normalised over the student's whole vocabulary. With g_i = ∂D/∂log q_i for the buckets i ∈ S ∪ {tail}
and G = Σ g_i:   ∂D/∂z_j = (1/τ) ( [j∈S] g_j − q_j G + [j∉S] g_tail q_j / q_tail ).

Shapes: N positions, D width, V vocabulary, K support, n positions of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.config import LossConfig
from limbeck.config.base import default
from limbeck.data.dataset import IGNORE
from limbeck.losses.blocks import BlockLoss, BlockSettings, Sums
from limbeck.losses.divergences import Divergence
from limbeck.registry import DIVERGENCES
from limbeck.targets.sparse import SparseTargets

_CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
_BLOCK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class FusedLossOutput:
    """The loss and its parts; everything but `loss` is detached and summed over valid positions.

    Attributes:
        loss: scalar, differentiable; (1−α)·CE + α·τ²·D divided by `num_items`.
        ce_sum, divergence_sum: Σ CE and Σ D in nats, before the weights and τ².
        num_valid: positions with a label.
        teacher_mass, student_mass: Σ over positions of the probability on the support, at τ.
        top1_matches: positions where student and teacher prefer the same id.
    """

    loss: torch.Tensor
    ce_sum: torch.Tensor
    divergence_sum: torch.Tensor
    num_valid: torch.Tensor
    teacher_mass: torch.Tensor
    student_mass: torch.Tensor
    top1_matches: torch.Tensor


def fused_distillation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None = None,
    *,
    bias: torch.Tensor | None = None,
    alpha: float = default(LossConfig, "alpha"),
    temperature: float = default(LossConfig, "temperature"),
    divergence: Divergence | str = "forward_kl",
    tail: str = default(LossConfig, "tail"),
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_items: torch.Tensor | float | None = None,
    chunk_size: int | None = None,
) -> FusedLossOutput:
    """(1−α)·CE + α·τ²·D of a linear head, with gradients for `hidden`, `weight` and `bias`.

    Args:
        hidden: `[..., D]` last hidden states.
        weight: `[V, D]` head; may be tied to the embedding or frozen (then ∂L/∂W is not computed).
        labels: `[...]` the next token of each position (already shifted); -100 carries no loss.
        targets: the teacher's `SparseTargets` with the same leading shape; None means α = 0.
        bias: `[V]` head bias.
        alpha: weight of the divergence in [0, 1].
        temperature: τ, which must be declared in `targets`.
        divergence: a `Divergence` such as `JSD(beta=0.3)`, or the name of one with its defaults.
        tail: bucket (the mass outside the support is one more id), renormalise (both distributions are
            conditioned on the support) or ignore (the tail's term is left out).
        logit_scale: factor on the logits.
        logit_softcap: c in z ← c·tanh(z/c), after the scale.
        num_items: divisor of the sums; default the number of valid positions here. Under accumulation or
            several ranks give the count of the whole batch.
        chunk_size: positions projected at once; default by the device's memory budget.

    Returns:
        FusedLossOutput; call `.loss.backward()`.

    Raises:
        ConfigError: an undeclared temperature, an unknown divergence, or sampled targets with another
            divergence than forward KL.
    """
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_labels = labels.reshape(-1)
    valid = (flat_labels != IGNORE).nonzero().squeeze(-1)
    vocab_size = weight.shape[0]
    settings = BlockSettings(
        alpha=alpha if targets is not None else 0.0,
        temperature=temperature,
        divergence=DIVERGENCES.build(divergence) if isinstance(divergence, str) else divergence,
        tail=tail,
        scale=logit_scale,
        softcap=logit_softcap,
    )
    flat_targets = None
    if targets is not None:
        flat_targets = targets.flatten()[valid].restrict_vocabulary(vocab_size)
    block_loss = BlockLoss(settings, flat_labels[valid], flat_targets)
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    plan = _Plan.choose(len(valid), vocab_size, device_type, chunk_size)
    with torch.autocast(device_type, enabled=False):
        loss_sum, sums = _FusedLoss.apply(flat_hidden[valid], weight, bias, block_loss, plan, dtype)  # type: ignore[no-untyped-call]
    divisor = num_items if num_items is not None else max(len(valid), 1)
    return FusedLossOutput(
        loss=loss_sum / divisor,
        ce_sum=sums[0],
        divergence_sum=sums[1],
        num_valid=torch.tensor(len(valid), device=hidden.device),
        teacher_mass=sums[2],
        student_mass=sums[3],
        top1_matches=sums[4],
    )


@dataclass(frozen=True)
class _Plan:
    """How many positions are projected at once, and how many of these are worked on while in cache."""

    chunk: int
    block: int

    @classmethod
    def choose(cls, positions: int, vocab_size: int, device_type: str, chunk_size: int | None) -> "_Plan":
        row = 4 * vocab_size
        kind = device_type if device_type in _CHUNK_BYTES else "cuda"
        chunk = chunk_size or max(16, min(2048, _CHUNK_BYTES[kind] // row))
        chunks = max(1, -(-positions // chunk))
        even = -(-positions // chunks) or 1  # equal chunks, so that none is left nearly empty
        return cls(chunk=even, block=max(1, min(even, _BLOCK_BYTES[kind] // row)))


class _FusedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them by the incoming scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        block_loss: BlockLoss,
        plan: _Plan,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in range(3))
        # Loss scaling comes after these products: in float16 small gradients would be gone before it.
        backward_dtype = torch.float32 if dtype == torch.float16 else dtype
        needs_logits = needs_hidden or needs_weight or needs_bias
        cast_weight = weight.detach().to(dtype)
        backward_weight = cast_weight.to(backward_dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=exact, device=hidden.device) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device) if needs_bias else None
        sums = Sums.zeros(hidden.device)
        scratch = block_loss.scratch(plan.block, weight.shape[0], exact, hidden.device)
        buffer = torch.empty(plan.chunk, weight.shape[0], dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), plan.chunk):
            chunk = hidden[start : start + plan.chunk].detach().to(dtype)
            logits = buffer[: len(chunk)]
            _project(chunk, cast_weight, bias, logits)
            for offset in range(0, len(chunk), plan.block):
                block = logits[offset : offset + plan.block]
                sums.add(block_loss(block, start + offset, scratch, gradient=needs_logits))
            if not needs_logits:
                continue
            dlogits = logits.to(backward_dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + len(chunk)] = dlogits @ backward_weight
            if grad_weight is not None:
                _accumulate(grad_weight, dlogits, chunk.to(backward_dtype))
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
        ctx.grads = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        details = sums.details()
        ctx.mark_non_differentiable(details)
        return sums.loss.to(exact), details

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        scale = grad_outputs[0]
        if ctx.grads is None:
            raise RuntimeError("fused_distillation_loss: backward was called a second time on one result")
        held: list[torch.Tensor | None] = ctx.grads
        if scale.dtype != torch.float64:  # checks in float64 ask more than once
            ctx.grads = None
        grads: list[torch.Tensor | None] = []
        for gradient, dtype in zip(held, ctx.dtypes, strict=True):
            if gradient is None:
                grads.append(None)
            elif gradient.dtype == torch.float64:
                grads.append((gradient * scale).to(dtype))
            else:  # in place: a second [V, D] tensor would double the peak
                grads.append(gradient.mul_(scale).to(dtype))
        return (*grads, None, None, None)


def _project(chunk: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor) -> None:
    """logits ← chunk · weightᵀ (+ bias), in the precision of `logits`."""
    if chunk.dtype == logits.dtype:
        torch.mm(chunk, weight.T, out=logits)
    else:
        logits.copy_(chunk @ weight.T)
    if bias is not None:
        logits += bias.detach().to(logits.dtype)


_WEIGHT_ROWS = 16384


def _accumulate(total: torch.Tensor, dlogits: torch.Tensor, chunk: torch.Tensor) -> None:
    """total += dlogitsᵀ · chunk, the sum kept in float32 whatever the inputs are."""
    if chunk.dtype == total.dtype:
        total.addmm_(dlogits.T, chunk)
        return
    for row in range(0, len(total), _WEIGHT_ROWS):
        total[row : row + _WEIGHT_ROWS] += dlogits[:, row : row + _WEIGHT_ROWS].T @ chunk
