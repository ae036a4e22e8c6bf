"""What a layer's experts see and do on calibration text, summed up while the text passes through.

The one idea: second moments say what a factorisation needs, so a layer is measured in one pass, and what grows with the
text stays in a file. A pair of a token and an expert counts by the square of its routing weight, which is the share
that the expert's error has in the squared error of the layer's output.

    mass     [E]     p_e = Σ g²                       inputs   [H, H]  Σ x xᵀ over the tokens
    scores   [E]     mean of g ‖f_e(x)‖ (REAP,        inside   [I, I]  Σ g² a aᵀ, a what the down projection gets
                     arXiv 2510.13999)                outputs  [H, H]  Σ g² f_e(x) f_e(x)ᵀ

Shapes: N tokens, K chosen experts, E experts, H hidden width, I width inside an expert.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
_RIDGE = 1e-2  # of the mean diagonal, added to a second moment: directions that the text never took keep some weight


@dataclass
class ExpertStatistics:
    """Sums over the calibration tokens of one layer, in float64; without calibration every direction counts alike."""

    mass: Tensor
    inputs: Tensor | None = None
    inside: Tensor | None = None
    outputs: Tensor | None = None
    scores: Tensor | None = None
    _norms: Tensor | None = field(default=None, repr=False)
    _counts: Tensor | None = field(default=None, repr=False)

    @classmethod
    def without_data(cls, experts: int, device: torch.device | None = None) -> "ExpertStatistics":
        """All experts alike, all directions alike."""
        return cls(torch.full((experts,), 1.0 / experts, dtype=torch.float64, device=device))

    @classmethod
    def empty(cls, experts: int, hidden: int, inside: int, device: torch.device | None = None) -> "ExpertStatistics":
        """Nothing measured yet."""
        exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
        widths = {"inputs": hidden, "inside": inside, "outputs": hidden}
        sums = {name: torch.zeros(width, width, **exact) for name, width in widths.items()}
        vectors = {name: torch.zeros(experts, **exact) for name in ("mass", "_norms", "_counts")}
        return cls(**sums, **vectors)

    @torch.no_grad()
    def observe(self, experts: Any, x: Tensor, chosen: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
        """Compute what the experts give for x `[N, H]` and add to the sums.

        Args:
            experts: fused, `gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]`.
            x: hidden states.
            chosen: `[N, K]` experts.
            weights: `[N, K]` theirs, g.
            counted: `[N]` True for tokens that are no filler.

        Returns:
            `[N, H]`, as the experts' own forward gives it.
        """
        assert self.inputs is not None
        assert self.inside is not None
        assert self.outputs is not None
        kept = x[counted]
        self.inputs += _moment(kept)
        out = torch.zeros_like(x)
        sums = (torch.zeros(self.inside.shape, device=x.device), torch.zeros(self.outputs.shape, device=x.device))
        for number in range(experts.num_experts):
            tokens, place = torch.where(chosen == number)
            if not len(tokens):
                continue
            gate, up = torch.nn.functional.linear(x[tokens], experts.gate_up_proj[number]).chunk(2, dim=-1)
            inside = experts.act_fn(gate) * up
            given = torch.nn.functional.linear(inside, experts.down_proj[number])
            g = weights[tokens, place].unsqueeze(-1)
            out.index_add_(0, tokens, (given * g).to(out.dtype))
            told = counted[tokens]
            self._add(number, inside[told], given[told], g[told].float(), sums)
        self.inside += sums[0].double()
        self.outputs += sums[1].double()
        return out

    def _add(self, number: int, inside: Tensor, given: Tensor, g: Tensor, sums: tuple[Tensor, Tensor]) -> None:
        """Add one expert's tokens; moments to the batch's sums in float32."""
        assert self._norms is not None
        assert self._counts is not None
        self.mass[number] += g.double().square().sum()
        weighted, seen = given.float() * g, inside.float() * g
        sums[0].addmm_(seen.mT, seen)
        sums[1].addmm_(weighted.mT, weighted)
        self._norms[number] += weighted.norm(dim=-1).double().sum()
        self._counts[number] += len(g)

    def finish(self) -> "ExpertStatistics":
        """Means in the place of sums."""
        assert self._norms is not None
        assert self._counts is not None
        self.scores = self._norms / self._counts.clamp_min(1.0)
        self.mass = self.mass / self.mass.sum().clamp_min(1e-30)
        return self


def _moment(x: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of x, in float64."""
    flat = x.float()
    return (flat.mT @ flat).double()


def whitening(moment: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """S = C^½ and S⁻¹ of a second moment with a ridge, in float64; without one the identity of the size of `like`."""
    one = torch.eye(like.shape[-1], dtype=torch.float64, device=like.device)
    if moment is None:
        return one, one
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(moment + ridge * one)
    root = values.clamp_min(1e-30).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
