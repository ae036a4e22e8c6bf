"""The loss written out over all logits, as the formula stands: slow, and differentiable as often as wanted.

The one idea: curvature needs second derivatives, which the fused loss does not have; on a few probe rows the
plain formula is cheap enough.

Shapes: N positions, V vocabulary, K support.
"""

import math

import torch

from limbeck.data.dataset import IGNORE
from limbeck.losses.divergences import get_divergence
from limbeck.targets.sparse import SparseTargets


def dense_distillation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    skew: float = 0.1,
) -> torch.Tensor:
    """(1−α)·CE + α·τ²·D with the tail as one bucket, mean over labelled positions.

    Args:
        logits: `[..., V]`; labels, targets and the settings as for `fused_distillation_loss`.
        labels: `[...]`, -100 where there is no loss.
        targets: the teacher's, or None for cross-entropy alone.
        alpha: weight of the divergence.
        temperature: τ, declared in `targets`.
        divergence: its name.
        jsd_beta: the teacher's share of the JSD mixture.
        skew: the teacher's share in skewed KL.
    """
    flat = labels.reshape(-1)
    valid = (flat != IGNORE).nonzero().squeeze(-1)
    z = logits.reshape(-1, logits.shape[-1])[valid].float()
    ce = torch.nn.functional.cross_entropy(z, flat[valid])
    if targets is None or alpha == 0.0:
        return ce
    kept = targets.flatten().restrict_vocabulary(z.shape[-1])[valid]
    log_p, log_tail = kept.at_temperature(temperature)
    present = kept.valid
    ids = torch.where(present, kept.token_ids, kept.token_ids[:, :1].clamp_min(0)).long()
    log_q = (z / temperature).log_softmax(dim=-1).gather(1, ids)
    if kept.weights is not None:  # an unbiased estimate of the forward KL
        gap = torch.where(present, kept.weights * (log_p - log_q), 0.0).sum(dim=-1)
        return (1.0 - alpha) * ce + alpha * temperature**2 * gap.mean()
    covered = torch.where(present, log_q.exp(), 0.0).sum(dim=-1, keepdim=True)
    rest = torch.log1p(-covered.clamp(max=1.0 - 1e-7))
    has_tail = log_tail.reshape(-1, 1) > -math.inf
    buckets = torch.cat([log_q, rest], dim=-1)
    mask = torch.cat([present, has_tail], dim=-1)
    teacher = torch.cat([log_p, log_tail.reshape(-1, 1)], dim=-1)
    value = get_divergence(divergence, jsd_beta, skew)(teacher, buckets, mask)
    return (1.0 - alpha) * ce + alpha * temperature**2 * value.mean()
