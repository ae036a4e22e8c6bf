"""Divergences between a teacher and a student on a partition of the vocabulary.

The one idea: the support's ids and, as one bucket, everything else form a partition; a divergence is one
function of the two lists of log-masses. Its gradient with respect to the student's log-masses is taken by
autograd on these few numbers, so adding a divergence is adding a class that holds its own parameters.

Shapes: N positions, K+1 buckets (the last is the tail). Buckets the teacher does not have hold -inf in both.
Every function is safe for -inf: x log x is 0 at 0.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.registry import DIVERGENCES

Tensor = torch.Tensor
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
#: Stands for the logarithm of a mass of 0: exp(-80) is 1e-35, far below any mass that matters, and a normal float32.
LOG_NOTHING = -80.0


class Divergence(ABC):
    """A frozen dataclass of its parameters, called with log-masses.

    Attributes:
        takes_draws: True for the forward KL, of which weighted draws are an unbiased estimate.
    """

    takes_draws: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """Nats `[N]` of teacher and student log-masses `[N, K+1]`; buckets outside `mask` do not exist."""


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(dim=-1)


def _clean(log_mass: Tensor, mask: Tensor) -> Tensor:
    """-inf replaced by 0 outside the mask, so that no gradient is 0 · inf."""
    return torch.where(mask, log_mass, 0.0)


@DIVERGENCES.register("forward_kl")
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p ‖ q) = Σ p (log p − log q)."""

    takes_draws: ClassVar[bool] = True

    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """As `Divergence`."""
        p_mask = mask & (log_p > -math.inf)
        p = _clean(log_p, p_mask)
        return _sum(p.exp() * (p - _clean(log_q, p_mask)), p_mask)


@DIVERGENCES.register("reverse_kl")
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q ‖ p) = Σ q (log q − log p); where p is 0 a floor keeps it finite."""

    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """As `Divergence`."""
        q = _clean(log_q, mask)
        return _sum(q.exp() * (q - _clean(log_p, mask).clamp_min(LOG_NOTHING)), mask)


@DIVERGENCES.register("jsd")
@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen–Shannon: β KL(p ‖ m) + (1−β) KL(q ‖ m), m = βp + (1−β)q (arXiv 2306.13649, eq. 1).

    Attributes:
        beta: the teacher's share of the mixture.
    """

    beta: Share = 0.5

    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """As `Divergence`."""
        beta = self.beta
        p, q = _clean(log_p, mask).clamp_min(LOG_NOTHING), _clean(log_q, mask)
        m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        return _sum(beta * p.exp() * (p - m) + (1.0 - beta) * q.exp() * (q - m), mask)


@DIVERGENCES.register("skewed_kl")
@dataclass(frozen=True)
class SkewedKL(Divergence):
    """KL(p ‖ λp + (1−λ)q), the skewed KL of DistiLLM (arXiv 2402.03898, eq. 3).

    Attributes:
        skew: λ, the teacher's share mixed into the student.
    """

    skew: Share = 0.1

    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """As `Divergence`."""
        p, q = _clean(log_p, mask).clamp_min(LOG_NOTHING), _clean(log_q, mask)
        m = torch.logaddexp(p + math.log(self.skew), q + math.log1p(-self.skew))
        return _sum(p.exp() * (p - m), mask)


@DIVERGENCES.register("tvd")
@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation: ½ Σ |p − q|."""

    def __call__(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """As `Divergence`."""
        return 0.5 * _sum((_clean(log_p, mask).exp() - _clean(log_q, mask).exp()).abs(), mask)


def same_width(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, V]` over one vocabulary: ids that only one side has get probability 0 on the other."""
    missing = log_p.shape[-1] - log_q.shape[-1]
    if missing > 0:
        log_q = torch.nn.functional.pad(log_q, (0, missing), value=-math.inf)
    elif missing < 0:
        log_p = torch.nn.functional.pad(log_p, (0, -missing), value=-math.inf)
    return log_p, log_q


def whole_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of whole distributions over one vocabulary, `[N, V]`, summed over positions in float64."""
    p = log_p.exp()
    # Below any logarithm of a float32 softmax, so that only a probability of 0 is changed.
    return torch.where(p > 0.0, p * (log_p - log_q.clamp_min(-1e4)), 0.0).sum(dtype=torch.float64)


def value_and_gradient(divergence: Divergence, log_p: Tensor, log_q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence `[N]` and its gradient with respect to `log_q` `[N, K+1]`."""
    with torch.enable_grad():
        log_q = log_q.detach().requires_grad_()
        value = divergence(log_p, log_q, mask)
        (gradient,) = torch.autograd.grad(value.sum(), log_q)
    return value.detach(), torch.where(mask, gradient, 0.0)
