"""Closed forms that turn a layer's fused experts into those of a compressed layer.

The one idea: each is the best of its form for squared errors weighted by what the layer sees (S = C^½ of its inputs)
and by how much each expert is used (p_e), so a truncated eigen- or singular-value decomposition gives it.

    latent       Σ_e p_e S W_eᵀW_e S → its R largest eigenvectors Q;  V = Qᵀ S⁻¹, A_e = W_e S Q (V made orthonormal);
                 Σ_e p_e W_e^d C_e W_e^dᵀ → its R largest eigenvectors U;  D_e = Uᵀ W_e^d
    core_delta   B = Σ_e p_e W_e;  U_e V_e = (W_e − B) S truncated to rank R, times S⁻¹
    shared_core  C = Σ_e p_e W_e;  the two wrappers of an expert in turns, each the reduced-rank regression
                 min ‖D − M X‖ over M of rank R, whose M X is the rank-R truncation of M_OLS X

Shapes: E experts, H hidden width, I width inside an expert, R rank; a matrix W is `[out, in]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from limbeck.compression.statistics import ExpertStatistics, whitening
from limbeck.students.compressed.experts import PROJECTIONS

Tensor = torch.Tensor
_ALTERNATIONS = 3  # of the two wrappers; each lowers the error, and the third by little


def _projection(experts: Any, name: str, number: int) -> Tensor:
    """One expert's matrix `[out, in]` in float64."""
    if name == "down_proj":
        found: Tensor = experts.down_proj[number]
    else:
        half = experts.gate_up_proj.shape[1] // 2
        found = experts.gate_up_proj[number, :half] if name == "gate_proj" else experts.gate_up_proj[number, half:]
    exact: Tensor = found.double()
    return exact


def _largest(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors `[n, R]` of the R largest eigenvalues."""
    found: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    return found


def latent(experts: Any, statistics: ExpertStatistics, rank: int) -> dict[str, Tensor]:
    """Weights of `LatentExperts` by name, in the precision of the experts."""
    count, half, _ = experts.gate_up_proj.shape
    root, inverse = whitening(statistics.inputs, experts.gate_up_proj)
    gram = torch.zeros_like(root)
    for mass, weight in zip(statistics.mass, experts.gate_up_proj, strict=True):
        wide = weight.float()
        gram += mass * (wide.mT @ wide).double()
    directions = _largest(root @ gram @ root, rank)
    written = statistics.outputs
    if written is None:
        written = torch.zeros_like(root)
        for mass, weight in zip(statistics.mass, experts.down_proj, strict=True):
            wide = weight.float()
            written += mass * (wide @ wide.mT).double()
    decoder = _largest(written, rank).float()
    # z in an orthonormal basis of its space: then A_e has the scale of W_e, which optimizers and scales go by.
    basis, change = torch.linalg.qr(inverse @ directions)
    inwards = (root @ directions @ change.mT).float()
    gate_up, down = (
        experts.gate_up_proj.new_empty(count, half, rank),
        experts.down_proj.new_empty(count, rank, half // 2),
    )
    for number in range(count):
        gate_up[number] = experts.gate_up_proj[number].float() @ inwards
        down[number] = decoder.mT @ experts.down_proj[number].float()
    encoder = basis.mT.float()
    return {
        "gate_up_proj": gate_up,
        "down_proj": down,
        "encoder.weight": encoder.to(down.dtype).contiguous(),
        "decoder.weight": decoder.to(down.dtype).contiguous(),
    }


def _mean(experts: Any, statistics: ExpertStatistics, name: str) -> Tensor:
    """Σ_e p_e W_e in float64."""
    parts = (mass * _projection(experts, name, number) for number, mass in enumerate(statistics.mass))
    total: Tensor = sum(parts, start=torch.zeros((), dtype=torch.float64, device=statistics.mass.device))
    return total


def _whitening_of(name: str, experts: Any, statistics: ExpertStatistics) -> tuple[Tensor, Tensor]:
    if name == "down_proj":
        return whitening(statistics.inside, experts.down_proj)
    return whitening(statistics.inputs, experts.gate_up_proj)


def core_delta(experts: Any, statistics: ExpertStatistics, rank: int) -> dict[str, Tensor]:
    """Weights of `CoreDeltaExperts` by name, in the precision of the experts."""

    def factors(weight: Tensor, core: Tensor, root: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
        u, v = _truncated((weight - core) @ root, rank)
        return _balanced(u, v @ inverse)

    return _around_cores(experts, statistics, ("u", "v") if rank else (), factors)


def shared_core(experts: Any, statistics: ExpertStatistics, rank: int) -> dict[str, Tensor]:
    """Weights of `SharedCoreExperts` by name, in the precision of the experts."""

    def factors(weight: Tensor, core: Tensor, root: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
        return _wrappers(weight, core, root, inverse, rank)

    return _around_cores(experts, statistics, ("out_u", "out_v", "in_u", "in_v") if rank else (), factors)


def _around_cores(
    experts: Any, statistics: ExpertStatistics, parts: Sequence[str], factors_of: Callable[..., tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """The mean of the experts for each projection, and each expert's factors around it, by name."""
    found: dict[str, Tensor] = {}
    dtype = experts.down_proj.dtype
    for name in PROJECTIONS:
        core = _mean(experts, statistics, name)
        found[f"shared_core.{name}.weight"] = core.to(dtype)
        if not parts:
            continue
        root, inverse = _whitening_of(name, experts, statistics)
        factors = []
        for number in range(len(experts.down_proj)):
            made = factors_of(_projection(experts, name, number), core, root, inverse)
            factors.append([factor.to(dtype) for factor in made])
        for place, part in enumerate(parts):
            found[f"wrapper.{name}_{part}"] = torch.stack([held[place] for held in factors])
    return found


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U `[m, R]` with orthonormal columns and V `[R, n]`, whose product is the best of rank R.

    By the eigenvectors of the smaller Gram matrix, which cost a fraction of a singular value decomposition.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        u = _largest(matrix @ matrix.mT, rank)
        return u, u.mT @ matrix
    w = _largest(matrix.mT @ matrix, rank)
    image = matrix @ w
    q, r = torch.linalg.qr(image)
    return q, r @ w.mT


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of U and rows of V of one norm, so that one learning rate fits both."""
    scale = (v.norm(dim=1) / u.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    return u * scale, v / scale.unsqueeze(1)


def _wrappers(weight: Tensor, core: Tensor, root: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, ...]:
    """U_out, V_out, U_in, V_in of one expert: min ‖(W − (I + U_out V_out) C (I + U_in V_in)) S‖ by turns."""
    out, into = weight.shape
    out_u, out_v = weight.new_zeros(out, rank), weight.new_zeros(rank, out)
    in_u, in_v = weight.new_zeros(into, rank), weight.new_zeros(rank, into)
    for _ in range(_ALTERNATIONS):
        inner = core + (core @ in_u) @ in_v
        out_u, out_v = _regressed((weight - inner) @ root, inner @ root, rank)
        outer = core + out_u @ (out_v @ core)
        in_u, in_v = _regressed_inside((weight - outer) @ root, outer, rank)
        in_v = in_v @ inverse
    return *_balanced(out_u, out_v), *_balanced(in_u, in_v)


def _regressed(difference: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, V of the M = U V of rank R that brings M x nearest to the difference."""
    ordinary = _least_squares(x @ x.mT, x @ difference.mT).mT
    u, _ = _truncated(ordinary @ x, rank)
    return u, u.mT @ ordinary


def _regressed_inside(difference: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, V of the N = U V of rank R that brings y N nearest to the difference."""
    ordinary = _least_squares(y.mT @ y, y.mT @ difference)
    v, _ = _truncated((y @ ordinary).mT, rank)
    return ordinary @ v, v.mT


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares by the normal equations, with so small a ridge that a singular Gram matrix can be solved."""
    ridge = 1e-9 * gram.diagonal().mean().clamp_min(1e-30)
    solved: Tensor = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right
    )
    return solved


FACTORISATIONS = {"latent": latent, "shared_core": shared_core, "core_delta": core_delta}


def rank_for(method: str, keep: float, experts: int, hidden: int, inside: int) -> int:
    """The rank at which a layer's experts have the share `keep` of their weights, rounded down to a multiple of 8.

    0 where the part that the experts share takes all of them already.
    """
    whole = 3 * experts * inside * hidden
    shared = 3 * inside * hidden
    a_rank = {
        "latent": 3 * experts * inside + 2 * hidden,
        "core_delta": 3 * experts * (inside + hidden),
        "shared_core": 6 * experts * (inside + hidden),
    }[method]
    free = keep * whole - (0 if method == "latent" else shared)
    most = hidden if method == "latent" else min(inside, hidden)
    return max(0, min(int(free / a_rank) // 8 * 8, most))
