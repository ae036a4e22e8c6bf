"""The loss written out over all logits, as the formula stands: slow, and differentiable as often as wanted.

The one idea: curvature needs second derivatives, which the fused loss does not have; on a few probe rows the
plain formula is cheap enough.

Shapes: N positions, V vocabulary, K support.
"""

import math

import torch

from limbeck.config import LossConfig
from limbeck.config.base import default
from limbeck.data.dataset import IGNORE
from limbeck.losses.divergences import LOG_NOTHING, Divergence
from limbeck.registry import DIVERGENCES
from limbeck.targets.sparse import SparseTargets


def dense_distillation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None = None,
    *,
    alpha: float = default(LossConfig, "alpha"),
    temperature: float = default(LossConfig, "temperature"),
    divergence: Divergence | str = "forward_kl",
    tail: str = default(LossConfig, "tail"),
) -> torch.Tensor:
    """(1−α)·CE + α·τ²·D, mean over labelled positions.

    Args:
        logits: `[..., V]`; labels, targets and the settings as for `fused_distillation_loss`.
        labels: `[...]`, -100 where there is no loss.
        targets: the teacher's, or None for cross-entropy alone.
        alpha: weight of the divergence.
        temperature: τ, declared in `targets`.
        divergence: a `Divergence`, or the name of one with its defaults.
        tail: bucket, renormalise or ignore.
    """
    flat = labels.reshape(-1)
    valid = (flat != IGNORE).nonzero().squeeze(-1)
    z = logits.reshape(-1, logits.shape[-1])[valid].float()
    ce = torch.nn.functional.cross_entropy(z, flat[valid])
    if targets is None or alpha == 0.0:
        return ce
    kept = targets.flatten()[valid].restrict_vocabulary(z.shape[-1])
    log_p, log_tail = kept.at_temperature(temperature)
    present = kept.valid
    ids = torch.where(present, kept.token_ids, kept.token_ids[:, :1].clamp_min(0)).long()
    log_q = (z / temperature).log_softmax(dim=-1).gather(1, ids)
    if kept.weights is not None:  # an unbiased estimate of the forward KL
        gap = torch.where(present, kept.weights * (log_p - log_q), 0.0).sum(dim=-1)
        return (1.0 - alpha) * ce + alpha * temperature**2 * gap.mean()
    if tail == "renormalise":
        log_p, log_q = (torch.where(present, x, -math.inf).log_softmax(dim=-1) for x in (log_p, log_q))
    has_tail = (present.sum(dim=-1, keepdim=True) < z.shape[-1]) & (tail == "bucket")
    teacher = torch.cat([log_p, log_tail.clamp_min(LOG_NOTHING).unsqueeze(-1)], dim=-1)
    buckets = torch.cat([torch.where(present, log_q, 0.0), _log_tail(z / temperature, ids, present)], dim=-1)
    mask = torch.cat([present, has_tail], dim=-1)
    compare = DIVERGENCES.build(divergence) if isinstance(divergence, str) else divergence
    value = compare(teacher, buckets, mask)
    return (1.0 - alpha) * ce + alpha * temperature**2 * value.mean()


def _log_tail(z: torch.Tensor, ids: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """log of the student's mass outside the support `[N, 1]`, a sum over the other ids."""
    outside = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, ~present[:, :1].expand_as(ids))
    masked = torch.where(outside, z, torch.finfo(z.dtype).min)
    return masked.logsumexp(dim=-1, keepdim=True) - z.logsumexp(dim=-1, keepdim=True)
