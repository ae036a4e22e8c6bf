"""Is this a saddle? Extreme curvature by Lanczos on exact Hessian-vector products, and a way down if there is.

The one idea: a stall with clearly negative curvature has a direction along which the loss falls at second
order; a line search along it, on fixed rows, accepts only a real drop.

Source: Lanczos 1950, with full re-orthogonalisation; negative-curvature escape as in Dauphin et al. 2014.
Shapes: P trainable weights, as one flat vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor
LossFn = Callable[[], Tensor]


@dataclass(frozen=True)
class Curvature:
    """The extreme Ritz values of a loss's Hessian, and the direction `[P]` of the smallest."""

    smallest: float
    largest: float
    direction: Tensor

    @property
    def is_saddle(self) -> bool:
        """Clearly negative: below −1e-3 and below −5 % of the largest."""
        return self.smallest < -max(1e-3, 0.05 * self.largest)


@dataclass(frozen=True)
class Escape:
    """What was tried: `kind` is none (no proof), move or noise; losses are those of the probe."""

    kind: str
    curvature: Curvature
    before: float
    after: float


def measure_curvature(parameters: Sequence[Tensor], loss_fn: LossFn, steps: int, seed: int = 0) -> Curvature:
    """Lanczos with `steps` Hessian-vector products of `loss_fn` at the present weights.

    Args:
        parameters: the weights, all of which `loss_fn` may use.
        loss_fn: scalar loss, twice differentiable.
        steps: products.
        seed: of the start vector.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss_fn(), parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])

        def product(vector: Tensor) -> Tensor:
            parts = torch.autograd.grad(flat @ vector, parameters, retain_graph=True, materialize_grads=True)
            return torch.cat([part.reshape(-1) for part in parts]).detach()

        return _lanczos(product, flat.detach(), min(steps, len(flat)), seed)


def _lanczos(product: Callable[[Tensor], Tensor], like: Tensor, steps: int, seed: int) -> Curvature:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
    basis = [vector / vector.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(steps):
        image = product(basis[-1])
        diagonal.append(image @ basis[-1])
        for _ in range(2):  # twice is enough to stay orthogonal
            for known in basis:
                image = image - (image @ known) * known
        size = image.norm()
        if step == steps - 1 or float(size) < 1e-10:
            break
        beside.append(size)
        basis.append(image / size)
    small = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.stack(beside)[: len(diagonal) - 1]
        small = small + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(small.double().cpu())
    direction = torch.zeros_like(like)
    for weight, known in zip(vectors[:, 0].tolist(), basis, strict=True):
        direction += weight * known
    return Curvature(float(values[0]), float(values[-1]), direction / direction.norm().clamp_min(1e-30))


def escape(parameters: Sequence[Tensor], loss_fn: LossFn, steps: int, seed: int = 0) -> Escape:
    """Prove a saddle and leave it: move along ± the direction, or failing a drop, one ball of noise.

    Weights change only when the proof holds. Arguments as for `measure_curvature`.
    """
    curvature = measure_curvature(parameters, loss_fn, steps, seed)
    with torch.no_grad():
        before = float(loss_fn())
        if not curvature.is_saddle:
            return Escape("none", curvature, before, before)
        start = [p.detach().clone() for p in parameters]
        scale = max(1.0, float(torch.stack([p.norm() for p in start]).norm()))
        best, chosen = before, 0.0
        for exponent in range(13):
            for sign in (1.0, -1.0):
                size = sign * scale * 1e-3 * 2.0**exponent
                _put(parameters, start, curvature.direction, size)
                loss = float(loss_fn())
                if loss < best:
                    best, chosen = loss, size
        if before - best > max(1e-4 * abs(before), 1e-9):
            _put(parameters, start, curvature.direction, chosen)
            return Escape("move", curvature, before, best)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(curvature.direction), generator=generator).to(curvature.direction)
        _put(parameters, start, noise / noise.norm(), scale * 1e-3)
        return Escape("noise", curvature, before, float(loss_fn()))


def _put(parameters: Sequence[Tensor], start: Sequence[Tensor], direction: Tensor, size: float) -> None:
    """parameters ← start + size · direction."""
    parts = torch.split(direction, [p.numel() for p in parameters])
    for parameter, origin, part in zip(parameters, start, parts, strict=True):
        parameter.copy_(origin + size * part.reshape(origin.shape))
