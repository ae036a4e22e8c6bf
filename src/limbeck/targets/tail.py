"""The normaliser at another temperature when only the top ids and the mass of the rest are known.

The one idea: what is known of the tail (its mass, its size, and that none of its ids is likelier than the last one
kept) fixes one power law p_r = p_K · (r/K)^−s over the ranks r = K … V, and its tempered sum has a closed form. It is
an estimate: exact only for such tails. A tail as one lump, m^(1/τ), is a lower bound and far off.

Shapes: N positions, K support, V vocabulary.
"""

import torch

Tensor = torch.Tensor
_STEEPEST = 400.0


def estimate_log_z(logprobs: Tensor, valid: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """log Σ_v exp(l_v / τ) over the whole vocabulary `[N]`, estimated from the top ids.

    Args:
        logprobs: `[N, K]` natural log-probabilities at temperature 1, -inf in unused places.
        valid: `[N, K]` bool, places that hold an id.
        vocab_size: V.
        temperature: τ.
    """
    kept = torch.where(valid, logprobs, -torch.inf).double()
    count = valid.sum(dim=-1).double()
    tail = (1.0 - kept.exp().sum(dim=-1)).clamp_min(0.0)
    last = torch.where(valid, logprobs, torch.inf).amin(dim=-1).double()
    reach = torch.log(vocab_size / count.clamp_min(1.0))  # log(V / K)
    steepness = _solve(tail / (last.exp() * count.clamp_min(1.0)), reach)
    rest = last / temperature + torch.log(count.clamp_min(1.0)) + _log_area(steepness / temperature, reach)
    rest = torch.where((tail > 0.0) & (count > 0) & (reach > 0), rest, -torch.inf)
    total = torch.logaddexp(torch.logsumexp(kept / temperature, dim=-1), rest)
    return torch.where(count > 0, total, 0.0).to(logprobs.dtype)


def _log_area(steepness: Tensor, reach: Tensor) -> Tensor:
    """log of ∫ x^−s dx from 1 to exp(reach)."""
    exponent = (1.0 - steepness) * reach
    small = exponent.abs() < 1e-6
    ratio = torch.expm1(exponent) / torch.where(small, 1.0, 1.0 - steepness)
    return torch.where(small, reach * (1.0 + exponent / 2.0), ratio).clamp_min(1e-300).log()


def _solve(area: Tensor, reach: Tensor) -> Tensor:
    """The s in [0, 400] whose area is the given one, by bisection; the nearest end where there is none."""
    low, high = torch.zeros_like(area), torch.full_like(area, _STEEPEST)
    wanted = area.clamp_min(1e-300).log()
    for _ in range(60):
        middle = (low + high) / 2.0
        too_wide = _log_area(middle, reach) > wanted
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    return (low + high) / 2.0
