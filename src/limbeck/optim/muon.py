"""Muon: momentum whose update is orthogonalised, for every matrix that a parameter really holds.

The one idea: a stored tensor may hold many matrices (one per expert, gate above up, one per attention head),
and each is orthogonalised apart, all of one shape in one batch. Sharded tensors (FSDP2) whose shard holds
whole matrices stay where they are; the others are gathered for the five products and shared out again.

    b ← μ b + (1−μ) g;   u = (1−μ) g + μ b (Nesterov);   p ← p (1 − lr·wd) − lr·c·NS₅(u)

Source: Jordan et al., "Muon" (2024); c as in torch.optim.Muon: √max(1, R/C) or 0.2·√max(R, C) (arXiv 2502.16982).
Shapes: n matrices of R rows and C columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from limbeck.models import MatrixLayout, bfloat16_is_fast
from limbeck.optim.state import state_like

Tensor = torch.Tensor
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_BATCH_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Newton–Schulz iteration towards U Vᵀ of each matrix of `[n, R, C]`, in float32.

    Args:
        matrices: the matrices; none is changed.
        steps: iterations of the quintic.
        dtype: precision of the products; default bfloat16 where the device has it in hardware, else float32.
    """
    if dtype is None:
        dtype = torch.bfloat16 if bfloat16_is_fast(str(matrices.device)) else torch.float32
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def muon_step(group: dict[str, Any], params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
    """One step over a group with `lr`, `weight_decay`, `momentum`, `nesterov`, `ns_steps`, `adjust_lr`, `layouts`.

    `layouts` holds `(rows, transposed)` of each parameter, in the order of `group["params"]`.
    """
    layouts = {id(p): MatrixLayout(*layout) for p, layout in zip(group["params"], group["layouts"], strict=True)}
    local = [local_part(p) for p in params]
    grads = [local_part(_gradient(p)) for p in params]
    for parameter, state in zip(params, states, strict=True):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = state_like(parameter, "momentum_buffer")
    buffers = [local_part(state["momentum_buffer"]) for state in states]
    torch._foreach_lerp_(buffers, grads, 1.0 - group["momentum"])
    updates = list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers
    torch._foreach_mul_(local, 1.0 - group["lr"] * group["weight_decay"])
    jobs = [_Job(p, u, layouts[id(p)]) for p, u in zip(params, updates, strict=True)]
    for batch in _batches(jobs, group["ns_steps"]):
        for job, update in batch:
            rate = group["lr"] * job.layout.factor(job.parameter.shape, group["adjust_lr"])
            local_part(job.parameter).add_(job.share(update), alpha=-rate)


@dataclass(frozen=True)
class _Job:
    """One parameter's update on its way to being orthogonalised."""

    parameter: Tensor
    update: Tensor  # this rank's part
    layout: MatrixLayout

    @property
    def stays_local(self) -> bool:
        """True when this rank holds whole matrices: a plain tensor, or a shard cut between matrices."""
        if not isinstance(self.parameter, DTensor):
            return True
        cut = [placement for placement in self.parameter.placements if not isinstance(placement, Replicate)]
        if not cut:
            return True
        if any(not isinstance(placement, Shard) or placement.dim != 0 for placement in cut):
            return False
        if self.parameter.ndim > 2:
            return True
        ranks = 1
        for size, placement in zip(self.parameter.device_mesh.shape, self.parameter.placements, strict=True):
            ranks *= 1 if isinstance(placement, Replicate) else size
        per_rank = -(-self.parameter.shape[0] // ranks)  # the first ranks' rows; later ones have no more
        return self.layout.rows > 0 and not self.layout.transposed and per_rank % self.layout.rows == 0

    def matrices(self) -> Tensor:
        """`[n, R, C]`: this rank's matrices, or all of them when a matrix lies across ranks."""
        return self.layout.split(self.update if self.stays_local else self._dtensor(self.update).full_tensor())

    def share(self, matrices: Tensor) -> Tensor:
        """What of the orthogonalised matrices belongs to this rank."""
        if self.stays_local:
            return self.layout.join(matrices, self.update.shape)
        assert isinstance(self.parameter, DTensor)
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        full = self.layout.join(matrices, self.parameter.shape).contiguous()
        replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(mesh, placements).to_local()

    def _dtensor(self, local: Tensor) -> DTensor:
        p = self.parameter
        assert isinstance(p, DTensor)
        return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _batches(jobs: Sequence[_Job], steps: int) -> Iterator[list[tuple[_Job, Tensor]]]:
    """Orthogonalise the jobs, matrices of one shape together, a bounded number of bytes at a time."""
    by_shape: dict[tuple[int, ...], list[_Job]] = {}
    for job in jobs:
        rows = job.layout.rows or job.parameter.shape[-1 if job.layout.transposed else -2]
        columns = job.parameter.shape[-2 if job.layout.transposed else -1]
        by_shape.setdefault((rows, columns), []).append(job)
    for (rows, columns), same in by_shape.items():
        kind = same[0].update.device.type
        limit = max(1, _BATCH_BYTES.get(kind, 1 << 30) // (4 * rows * columns))
        waiting: list[tuple[_Job, Tensor]] = []
        for job in same:
            waiting.append((job, job.matrices()))
            if sum(len(matrices) for _, matrices in waiting) >= limit:
                yield _orthogonalise_together(waiting, limit, steps)
                waiting = []
        if waiting:
            yield _orthogonalise_together(waiting, limit, steps)


def _orthogonalise_together(
    waiting: Sequence[tuple[_Job, Tensor]], limit: int, steps: int
) -> list[tuple[_Job, Tensor]]:
    together = torch.cat([matrices for _, matrices in waiting]) if len(waiting) > 1 else waiting[0][1]
    done = (
        torch.cat([orthogonalise(part, steps) for part in torch.split(together, limit)]) if len(together) else together
    )
    parts = torch.split(done, [len(matrices) for _, matrices in waiting])
    return [(job, part) for (job, _), part in zip(waiting, parts, strict=True)]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
