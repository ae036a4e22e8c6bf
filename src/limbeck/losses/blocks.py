"""One block of logits in, its loss out, and the block turned into its own gradient.

The one idea: everything that needs the whole vocabulary happens here, on a few megabytes that stay in
cache. The support is taken out of the block first and what is left is summed relative to its own largest
logit, so the tail's mass is a sum of positive numbers and never 1 − Σ, and it does not underflow: its logarithm is
exact in float32 however small it is.

Shapes: n positions of the block, V vocabulary, K support.
"""

import math
from dataclasses import dataclass

import torch

from limbeck.errors import ConfigError
from limbeck.losses.divergences import LOG_NOTHING, Divergence, value_and_gradient
from limbeck.targets.sparse import SparseTargets

Tensor = torch.Tensor


@dataclass(frozen=True)
class BlockSettings:
    """The loss, as chosen once for all blocks."""

    alpha: float
    temperature: float
    divergence: Divergence
    tail: str
    scale: float
    softcap: float | None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is {self.alpha}; it must lie between 0 and 1")
        if self.temperature <= 0.0:
            raise ConfigError(f"temperature is {self.temperature}; it must be positive")
        if self.tail not in ("bucket", "renormalise", "ignore"):
            raise ConfigError(f"unknown tail policy {self.tail!r}; choose bucket, renormalise or ignore")


@dataclass
class Sums:
    """Sums over the positions seen so far, in float64."""

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    matches: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        """All sums 0."""
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(6)))

    def add(self, other: "Sums") -> None:
        """Add a block's sums."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def details(self) -> Tensor:
        """[5]: CE, divergence, teacher mass, student mass, top-1 matches."""
        return torch.stack([self.ce, self.divergence, self.teacher_mass, self.student_mass, self.matches])


@dataclass(frozen=True)
class _Teacher:
    """The teacher's side of one block: `[n, K]` ids, `[n, K+1]` log-masses (last: tail) and their mask.

    `top1` [n, 1] is the place of the likeliest id in the support, `mass` [n] the probability on it.
    """

    ids: Tensor
    log_p: Tensor
    mask: Tensor
    top1: Tensor
    mass: Tensor
    weights: Tensor | None


class BlockLoss:
    """Loss and gradient of any block of the valid positions."""

    def __init__(self, settings: BlockSettings, labels: Tensor, targets: SparseTargets | None) -> None:
        self.settings, self.labels, self.targets = settings, labels, targets
        if targets is not None:
            self._log_p, self._log_tail = targets.at_temperature(settings.temperature)
            if targets.weights is not None and not settings.divergence.takes_draws:
                raise ConfigError(
                    f"sampled targets estimate the forward KL and loss.divergence is {settings.divergence}. "
                    "Use forward_kl, or targets without sampling."
                )
            if targets.weights is not None and settings.tail == "renormalise":
                raise ConfigError(
                    "sampled targets stand for the whole vocabulary and loss.tail is renormalise. Use bucket."
                )

    def scratch(self, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the second set of exponentials, needed when CE and D have different temperatures."""
        s = self.settings
        needed = self.targets is not None and s.temperature != 1.0
        return torch.empty((rows, vocab_size) if needed else (0, 0), dtype=dtype, device=device)

    def __call__(self, z: Tensor, start: int, scratch: Tensor, *, gradient: bool) -> Sums:
        """Sums of the block of logits `z` [n, V] at position `start`; `z` becomes ∂(Σ loss)/∂logits."""
        s = self.settings
        labels = self.labels[start : start + len(z)].unsqueeze(-1)
        capped = self._transform(z) if gradient else self._transform(z, keep=False)
        z_label = z.gather(1, labels)
        sums = Sums.zeros(z.device)
        if self.targets is None:
            top = z.amax(dim=-1, keepdim=True)
            z_label -= top
            total = z.sub_(top).exp_().sum(dim=-1, keepdim=True)
            ce = total.log() - z_label
            sums.ce = sums.loss = ce.sum(dtype=torch.float64)
            if gradient:
                z /= total
                z.scatter_add_(1, labels, torch.full_like(z_label, -1.0))
        else:
            teacher = self._teacher(start, *z.shape)
            sums = self._distil(z, labels, z_label, teacher, scratch[: len(z)], gradient)
        if gradient:
            if capped is not None:
                z *= capped
            if s.scale != 1.0:
                z *= s.scale
        return sums

    def _transform(self, z: Tensor, keep: bool = True) -> Tensor | None:
        """Scale and soft-cap in place; returns the cap's derivative [n, V] when there is one."""
        s = self.settings
        if s.scale != 1.0:
            z *= s.scale
        if s.softcap is None:
            return None
        z /= s.softcap
        z.tanh_()
        derivative = 1.0 - z * z if keep else None
        z *= s.softcap
        return derivative

    def _teacher(self, start: int, count: int, vocab_size: int) -> _Teacher:
        assert self.targets is not None
        part = self.targets[slice(start, start + count)]
        log_p, log_tail = self._log_p[start : start + count], self._log_tail[start : start + count]
        valid = part.valid
        # Unused places repeat the first id; where the teacher said nothing at all, id 0 stands in.
        ids = torch.where(valid, part.token_ids, part.token_ids[:, :1].clamp_min(0)).long()
        top1 = torch.where(valid, log_p, -math.inf).argmax(dim=-1, keepdim=True)
        mass = torch.where(valid, log_p, -math.inf).exp().sum(dim=-1)
        if self.settings.tail == "renormalise":
            log_p = torch.log_softmax(torch.where(valid, log_p, -math.inf), dim=-1)
        # A support that is the whole vocabulary leaves the student no tail to move.
        has_tail = valid.sum(dim=-1, keepdim=True) < vocab_size
        if self.settings.tail != "bucket" or part.weights is not None:
            has_tail = torch.zeros_like(has_tail)
        mask = torch.cat([valid, has_tail], dim=-1)
        log_p = torch.cat([log_p, log_tail.clamp_min(LOG_NOTHING).unsqueeze(-1)], dim=-1)
        return _Teacher(ids=ids, log_p=log_p, mask=mask, top1=top1, mass=mass, weights=part.weights)

    def _distil(
        self, z: Tensor, labels: Tensor, z_label: Tensor, teacher: _Teacher, scratch: Tensor, gradient: bool
    ) -> Sums:
        """CE and divergence of logits `z`; `z` becomes the gradient."""
        s = self.settings
        tau = s.temperature
        valid = teacher.mask[:, :-1]
        z_support = z.gather(1, teacher.ids)
        # The support leaves the block; an empty one takes nothing along.
        z.scatter_(1, teacher.ids, torch.where(valid[:, :1], -math.inf, z_support))
        on_support = torch.where(valid, z_support, -math.inf)
        tail_top, support_top = z.amax(dim=-1, keepdim=True), on_support.amax(dim=-1, keepdim=True)
        top = torch.maximum(tail_top, support_top)
        anchor = torch.where(tail_top > -math.inf, tail_top, top)  # no tail: everything in the block is -inf
        sums = Sums.zeros(z.device)
        sums.matches = _matches(z, on_support, teacher, tail_top, top)
        z -= anchor
        gap = anchor - top
        soft = z if tau == 1.0 else torch.mul(z, 1.0 / tau, out=scratch)
        shifted = on_support - top
        parts = _normalise(soft.exp_(), shifted / tau, gap / tau)
        hard = parts if tau == 1.0 else _normalise(z.exp_(), shifted, gap)
        log_q = torch.where(valid, shifted / tau, 0.0) - parts.log_total
        value, g = self._divergence(teacher, log_q, parts.log_tail - parts.log_total)
        sums.ce = (hard.log_total - (z_label - top)).sum(dtype=torch.float64)
        sums.divergence = value.sum(dtype=torch.float64)
        sums.loss = (1.0 - s.alpha) * sums.ce + s.alpha * tau * tau * sums.divergence
        sums.teacher_mass = teacher.mass.sum(dtype=torch.float64)
        sums.student_mass = parts.q.sum(dtype=torch.float64)
        if gradient:
            self._gradient(z, soft, labels, teacher.ids, parts, hard, g)
        return sums

    def _divergence(self, teacher: _Teacher, log_q: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence [n] and ∂D/∂log q of the buckets [n, K+1], q normalised over the vocabulary."""
        s = self.settings
        valid = teacher.mask[:, :-1]
        floored = torch.where(log_tail > -math.inf, log_tail, LOG_NOTHING)
        if s.tail == "renormalise":
            on_support = torch.log_softmax(torch.where(valid, log_q, -math.inf), dim=-1)
            buckets = torch.cat([on_support, floored], dim=-1)
            value, g = value_and_gradient(s.divergence, teacher.log_p, buckets, teacher.mask)
            # through the softmax over the support: Σ over it is 0, so the whole vocabulary's q drops out
            g = g - torch.where(teacher.mask, buckets.exp(), 0.0) * g.sum(dim=-1, keepdim=True)
            return value, g
        buckets = torch.cat([log_q, floored], dim=-1)
        if teacher.weights is not None:  # Σ w (log p − log q): unbiased for the forward KL, as E[w] = p
            w = torch.where(valid, teacher.weights, 0.0)
            value = (w * torch.where(valid, teacher.log_p[:, :-1] - log_q, 0.0)).sum(dim=-1)
            return value, torch.cat([-w, torch.zeros_like(log_tail)], dim=-1)
        return value_and_gradient(s.divergence, teacher.log_p, buckets, teacher.mask)

    def _gradient(
        self, z: Tensor, soft: Tensor, labels: Tensor, ids: Tensor, parts: "_Parts", hard: "_Parts", g: Tensor
    ) -> None:
        """Write ∂(Σ loss)/∂z into `z`; `z` and `soft` hold the tail's exponentials, the support at 0."""
        s = self.settings
        w = s.alpha * s.temperature  # α τ² · (1/τ)
        ce_weight = 1.0 - s.alpha
        g_sum = g.sum(dim=-1, keepdim=True)
        # off the support: q_j (g_tail / q_tail − G), and q_j / q_tail = e_j / Σ e
        off = w * (g[:, -1:] / parts.tail_sum.clamp_min(1.0) - g_sum * parts.tail_factor)
        on = w * (g[:, :-1] - parts.q * g_sum) + ce_weight * hard.q
        if soft is z:
            z *= ce_weight * hard.tail_factor + off
        else:
            z *= ce_weight * hard.tail_factor
            z.addcmul_(soft, off)
        z.scatter_add_(1, ids, on)
        z.scatter_add_(1, labels, torch.full_like(labels, -ce_weight, dtype=z.dtype))


@dataclass(frozen=True)
class _Parts:
    """A softmax in two parts, its logarithms relative to the row's largest logit.

    Attributes:
        tail_sum: `[n, 1]` Σ of the tail's exponentials relative to its own largest: 0 (no tail) or at least 1.
        tail_factor: `[n, 1]` what such an exponential is multiplied by to be a probability.
        log_tail, log_total: `[n, 1]` log Σ over the tail, and over the vocabulary.
        q: `[n, K]` probabilities of the support, 0 in unused places.
    """

    tail_sum: Tensor
    tail_factor: Tensor
    log_tail: Tensor
    log_total: Tensor
    q: Tensor


def _normalise(exponentials: Tensor, on_support: Tensor, gap: Tensor) -> _Parts:
    """Put the two parts together.

    Args:
        exponentials: `[n, V]` of the tail relative to its largest logit, 0 on the support.
        on_support: `[n, K]` the support's logits relative to the row's largest, -inf in unused places.
        gap: `[n, 1]` the tail's largest logit relative to the row's.
    """
    tail_sum = exponentials.sum(dim=-1, keepdim=True)
    log_tail = tail_sum.log() + gap
    log_total = torch.logaddexp(log_tail, torch.logsumexp(on_support, dim=-1, keepdim=True))
    return _Parts(tail_sum, (gap - log_total).exp(), log_tail, log_total, (on_support - log_total).exp())


def _matches(z: Tensor, on_support: Tensor, teacher: _Teacher, tail_top: Tensor, top: Tensor) -> Tensor:
    """How many of the teacher's favourites the student prefers; of equal logits the lowest id counts, as in argmax.

    Args:
        z: `[n, V]` logits, -inf on the support.
        on_support: `[n, K]` logits of the support, -inf at unused places.
        teacher: its ids and favourites.
        tail_top, top: `[n, 1]` largest logit outside the support, and of all.
    """
    match = (on_support.gather(1, teacher.top1) == top) & teacher.mask[:, :1]
    equals = (on_support == top).sum(dim=1, keepdim=True) + (tail_top == top)
    rows = (match & (equals > 1)).squeeze(1).nonzero().squeeze(1)  # an argmax of all rows costs far more than an amax
    if len(rows):
        ids, none, highest = teacher.ids[rows], z.shape[1], top[rows]
        first = torch.where(on_support[rows] == highest, ids, none).amin(dim=1, keepdim=True)
        outside = torch.where(tail_top[rows] == highest, z[rows].argmax(dim=1, keepdim=True), none)
        match[rows] = ids.gather(1, teacher.top1[rows]) <= torch.minimum(first, outside)
    return match.sum(dtype=torch.float64)
