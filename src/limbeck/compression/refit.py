"""Latent experts fitted to what they really see: after the spaces are chosen, each expert's matrices by least squares.

The one idea: the closed form of the spaces knows the text by moments over all tokens; an expert sees some of them
only, and its down projection gets activations that are not quite those of before. Both are linear least squares for one
expert at a time, around the solution there is: directions in which its tokens say little stay as they were.

    A_e ← argmin Σ g² ‖W_e x − A z‖² + λ ‖A − A_e‖²            z = V x
    D_e ← argmin Σ g² ‖Uᵀ W_e^d a − D â‖² + λ ‖D − D_e‖²       â = silu(A_e^g z) ⊙ A_e^u z

Shapes: N tokens, n an expert's tokens, E experts, H hidden width, I width inside an expert, R rank.
"""

from typing import Any

import torch

Tensor = torch.Tensor
_PRIOR = 0.1  # what the solution there is counts, in tokens for each dimension
_MOST_TOKENS = 16384  # of one expert


@torch.no_grad()
def refit_latent(experts: Any, gate: Any, inputs: Tensor, tensors: dict[str, Tensor]) -> None:
    """Fit, in place, the weights of `LatentExperts` by name.

    Args:
        experts: the fused experts that they stand for.
        gate: the layer's router.
        inputs: `[N, H]` what the experts' layer gets of the calibration text.
        tensors: `gate_up_proj` `[E, 2I, R]`, `down_proj` `[E, R, I]`, `encoder.weight`, `decoder.weight`.
    """
    chosen, weights = _routing(gate, inputs)
    encoder, decoder = (tensors[f"{name}.weight"].float() for name in ("encoder", "decoder"))
    for number in range(experts.num_experts):
        tokens, place = torch.where(chosen == number)
        tokens, place = tokens[:_MOST_TOKENS], place[:_MOST_TOKENS]
        if not len(tokens):
            continue
        g = weights[tokens, place].float().unsqueeze(-1)
        x = inputs[tokens.to(inputs.device)].to(encoder.device).float()
        z = x @ encoder.mT
        whole, down = experts.gate_up_proj[number].float(), experts.down_proj[number].float()
        small = _fitted(z * g, (x @ whole.mT) * g, tensors["gate_up_proj"][number].float())
        tensors["gate_up_proj"][number] = small
        inside, narrow = (_activated(experts, y @ w.mT) * g for y, w in ((x, whole), (z, small)))
        wanted = (inside @ down.mT) @ decoder
        tensors["down_proj"][number] = _fitted(narrow, wanted, tensors["down_proj"][number].float())


def _routing(gate: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Experts `[N, K]` and their weights, a part of the tokens at a time."""
    found = [gate(part.to(gate.weight))[1:3] for part in torch.split(inputs, 4096)]
    return torch.cat([chosen for _, chosen in found]), torch.cat([weights for weights, _ in found])


def _activated(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    result: Tensor = experts.act_fn(gate) * up
    return result


def _fitted(x: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """W `[out, in]` with W x nearest to y `[n, out]`, and near to what it was where x `[n, in]` says little."""
    gram = x.mT @ x
    weight = _PRIOR * x.shape[1] / len(x) * gram.diagonal().mean().clamp_min(1e-30)
    one = torch.eye(len(gram), device=gram.device)
    rest = y - x @ before.mT
    found: Tensor = before + torch.linalg.solve(gram + weight * one, x.mT @ rest).mT
    return found
