"""One optimizer, an algorithm per group: Muon for matrices, Lion or AdamW for the rest.

The one idea: a group names its `algorithm`; everything around an optimizer (schedules, accelerate, FSDP2,
checkpoints, gradient scaling) sees a single `torch.optim.Optimizer`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from limbeck.errors import ConfigError
from limbeck.optim.muon import local_part, muon_step
from limbeck.optim.state import lives_elsewhere, state_like

Tensor = torch.Tensor
Step = Callable[[dict[str, Any], Sequence[Tensor], Sequence[dict[str, Any]]], None]


def lion_step(group: dict[str, Any], params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
    """p ← p (1 − lr·wd) − lr·sign(β₁ m + (1−β₁) g);  m ← β₂ m + (1−β₂) g (Chen et al., arXiv 2302.06675)."""
    for parameter, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            state["exp_avg"] = state_like(parameter, "exp_avg")
    weights, grads = _locals(params), _locals([p.grad for p in params])
    averages = _locals([state["exp_avg"] for state in states])
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
    directions = torch._foreach_mul(averages, beta1)
    torch._foreach_add_(directions, grads, alpha=1.0 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_add_(weights, directions, alpha=-group["lr"])
    torch._foreach_mul_(averages, beta2)
    torch._foreach_add_(averages, grads, alpha=1.0 - beta2)


def adamw_step(group: dict[str, Any], params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
    """AdamW by torch's own fused kernel (Loshchilov & Hutter, arXiv 1711.05101)."""
    for parameter, state in zip(params, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (state_like(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = group["betas"]
    adamw(
        _locals(params),
        _locals([p.grad for p in params]),
        _locals([state["exp_avg"] for state in states]),
        _locals([state["exp_avg_sq"] for state in states]),
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


#: Algorithms by name: the step, and the keys a group of it may leave out.
ALGORITHMS: dict[str, tuple[Step, dict[str, Any]]] = {
    "muon": (muon_step, {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr": "original"}),
    "lion": (lion_step, {"betas": (0.9, 0.99)}),
    "adamw": (adamw_step, {"betas": (0.9, 0.95), "eps": 1e-8}),
}


class HybridOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups each name an algorithm.

    Args:
        groups: dicts with `params`, `lr`, `algorithm` (muon, lion, adamw), optionally `weight_decay`, `name`,
            and the algorithm's own keys: muon `momentum`, `nesterov`, `ns_steps`, `adjust_lr`, `layouts`; lion and
            adamw `betas`; adamw `eps`.

    Raises:
        ConfigError: an unknown algorithm, or Muon over a tensor that holds no matrix.

    Example:
        >>> HybridOptimizer([
        ...     {"params": matrices, "algorithm": "muon", "lr": 0.02},
        ...     {"params": others, "algorithm": "lion", "lr": 1e-4},
        ... ])
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        whole = []
        for group in groups:
            algorithm = group.get("algorithm")
            if algorithm not in ALGORITHMS:
                raise ConfigError(f"unknown optimizer algorithm {algorithm!r}; choose {', '.join(ALGORITHMS)}.")
            group = {"weight_decay": 0.0, "name": algorithm, **ALGORITHMS[algorithm][1], **group}
            group["params"] = list(group["params"])
            if algorithm == "muon":
                group.setdefault("layouts", [(0, False)] * len(group["params"]))
                for parameter in group["params"]:
                    if parameter.ndim < 2:
                        raise ConfigError(
                            f"Muon works on matrices and group {group['name']!r} holds a tensor of shape "
                            f"{tuple(parameter.shape)}. Give it to lion or adamw."
                        )
            whole.append(group)
        super().__init__(whole, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            alone = [[p] for p in params if lives_elsewhere(p)]
            for together in ([p for p in params if not lives_elsewhere(p)], *alone):
                if together:
                    ALGORITHMS[group["algorithm"]][0](group, together, [self.state[p] for p in together])
        return loss


def _locals(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """This rank's parts: what these algorithms do, they do to every entry alone."""
    return [local_part(t) for t in tensors if t is not None]
