"""Leaving out: experts by what they contribute, layers by what they change, feed-forward channels with a refit.

The one idea: what is left out is chosen by its effect on the calibration text; where what stays can make up for it in
closed form (the down projection behind fewer channels), it does.

Shapes: E experts, H hidden width, I feed-forward width, F channels that are kept.
"""

from collections.abc import Sequence
from typing import Any

import torch

from limbeck.compression.statistics import ExpertStatistics

Tensor = torch.Tensor


def kept_experts(statistics: ExpertStatistics, count: int) -> Tensor:
    """The numbers of the `count` experts that contribute most (REAP, arXiv 2510.13999), ascending."""
    assert statistics.scores is not None
    return statistics.scores.argsort(descending=True, stable=True)[:count].sort().values


def without_experts(experts: Any, kept: Tensor) -> dict[str, Tensor]:
    """The fused weights of the experts that stay."""
    return {name: getattr(experts, name)[kept] for name in ("gate_up_proj", "down_proj")}


def prune_channels(mlp: Any, moment: Tensor | None, keep: int) -> dict[str, Tensor]:
    """Keep F channels of a gated feed-forward layer, and refit its down projection to them.

    A channel's worth is what leaving it out costs, E[a_i²]·‖W_down[:, i]‖². With the second moment C of the channels
    the refit is the least-squares one: W_down[:, all] C[all, kept] C[kept, kept]⁻¹. Without it every channel counts by
    its three vectors' norms, and nothing is refitted.

    Args:
        mlp: with `gate_proj`, `up_proj` `[I, H]` and `down_proj` `[H, I]`, linear layers.
        moment: C `[I, I]`, or None.
        keep: F.

    Returns:
        weights by name.
    """
    down = mlp.down_proj.weight.double()
    if moment is None:
        norms = [mlp.gate_proj.weight.double().norm(dim=1), mlp.up_proj.weight.double().norm(dim=1), down.norm(dim=0)]
        worth = norms[0] * norms[1] * norms[2]
    else:
        worth = moment.diagonal() * down.square().sum(dim=0)
    kept = worth.argsort(descending=True, stable=True)[:keep].sort().values
    if moment is None:
        refitted = down[:, kept]
    else:
        ridge = 1e-6 * moment.diagonal().mean().clamp_min(1e-30)
        inner = moment[kept][:, kept] + ridge * torch.eye(keep, dtype=torch.float64, device=moment.device)
        refitted = torch.linalg.solve(inner, moment[kept] @ down.mT).mT
    found = {"down_proj.weight": refitted.float()}
    for name in ("gate_proj", "up_proj"):
        layer = getattr(mlp, name)
        found[f"{name}.weight"] = layer.weight[kept].float()
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias[kept].float()
    return found


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Numbers of `keep` layers, the first and the last among them."""
    if keep == 1:
        return [0]
    return sorted({round(place * (layers - 1) / (keep - 1)) for place in range(keep)})


def kept_layers(changes: list[float], keep: int) -> list[int]:
    """Numbers of the layers that change the hidden states most (block influence, arXiv 2403.03853), ascending.

    Args:
        changes: of each layer 1 − cos(what goes in, what comes out), the mean over the tokens.
        keep: how many stay.
    """
    order = sorted(range(len(changes)), key=lambda number: (-changes[number], number))
    return sorted(order[:keep])


def with_attention(layers: list[int], kinds: Sequence[str] | None, changes: Sequence[float] | None = None) -> list[int]:
    """The same layers with one of full attention among them: a model of delta nets alone cannot generate.

    Args:
        layers: numbers of those that stay.
        kinds: the model's `layer_types`; None: all layers attend.
        changes: what each layer changes, where it was measured; the one that goes changes least.
    """
    full = [number for number, kind in enumerate(kinds or []) if kind == "full_attention"]
    if not full or set(full) & set(layers):
        return layers
    worth = changes or [0.0] * len(kinds or [])
    goes = min(layers, key=lambda number: (worth[number], number))
    comes = max(full, key=lambda number: (worth[number], -abs(number - goes)))
    return sorted({*layers, comes} - {goes})
