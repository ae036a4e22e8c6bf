"""Losses of routed experts: load balance, and a brake on the router's logits.

The one idea: both are means over the tokens of each layer's router, so that a dense model has none and a
micro-batch counts by its tokens.

    load balance = E · Σ_e f_e P_e      f: share of the assignments, P: mean probability (Switch, arXiv 2101.03961,
                                        eq. 4–6); 1 at perfect balance, whatever top_k is
    z            = mean (logsumexp z)²  (ST-MoE, arXiv 2202.08906, eq. 5)
    entropy      = mean −Σ_e p log p

Shapes: N tokens, E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.errors import ConfigError


@dataclass(frozen=True)
class RouterLosses:
    """Means over layers and tokens; `load` [E] is each expert's share of the assignments, all layers together."""

    load_balance: torch.Tensor
    aux: torch.Tensor
    load: torch.Tensor


def router_losses(
    logits: Sequence[torch.Tensor], tokens: torch.Tensor | None, top_k: int, kind: str = "z"
) -> RouterLosses:
    """The router's losses, differentiable.

    Args:
        logits: per layer `[N, E]`, before the softmax.
        tokens: `[N]` True for tokens that count; None: all do.
        top_k: experts a token goes to.
        kind: what `aux` is: z or entropy.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in ("z", "entropy"):
        raise ConfigError(f"loss.router_aux_kind is {kind!r}; choose z or entropy.")
    flat = None if tokens is None else tokens.reshape(-1)
    balance, aux, load = [], [], []
    for layer in logits:
        z = layer.reshape(-1, layer.shape[-1]).float()
        z = z if flat is None else z[flat.to(layer.device)]
        log_p = z.log_softmax(dim=-1)
        chosen = log_p.detach().topk(top_k, dim=-1).indices.flatten()
        share = torch.zeros(z.shape[-1], device=z.device).index_add_(
            0, chosen, torch.full((len(chosen),), 1.0 / max(len(chosen), 1), device=z.device)
        )
        count = max(len(z), 1)
        balance.append(z.shape[-1] * (share * log_p.exp().sum(dim=0) / count).sum())
        per_token = z.logsumexp(dim=-1).square() if kind == "z" else -(log_p.exp() * log_p).sum(dim=-1)
        aux.append(per_token.sum() / count)
        load.append(share)
    return RouterLosses(torch.stack(balance).mean(), torch.stack(aux).mean(), torch.stack(load).mean(dim=0))


def routing_top_k(config: Any) -> int | None:
    """Experts a token goes to when the model can report its router's logits; None for a dense model."""
    if not hasattr(config, "output_router_logits"):
        return None
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return None
