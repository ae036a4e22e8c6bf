"""Losses of routed experts: load balance, and a brake on the router's logits.

The one idea: both are means over the tokens of each layer's router, so that a dense model has none and a
micro-batch counts by its tokens. Routers are listened to where they decide, so the load is that of the experts they
really chose, by whatever score, bias or grouping.

    load balance = E · Σ_e f_e P_e      f: share of the assignments, P: mean probability (Switch, arXiv 2101.03961,
                                        eq. 4–6); 1 at perfect balance, whatever top_k is. Of routers that score by a
                                        sigmoid P is the share of the scores (DeepSeek-V3, arXiv 2412.19437, eq. 17–20)
    z            = mean (logsumexp z)²  (ST-MoE, arXiv 2202.08906, eq. 5)
    entropy      = mean −Σ_e p log p

The balance is a product of two means, so it is that of each micro-batch (as in Switch and Megatron): eight
micro-batches, each in balance, count as balanced, and their mean is not the balance of the eight as one batch.

Shapes: N tokens, E experts, K chosen experts, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.errors import ConfigError

Tensor = torch.Tensor
#: Routers whose output does not name the chosen experts, and which take those of the largest logits; True: their
#: weights are sigmoids.
_BY_LOGITS = {"JetMoeTopKGating": False, "DbrxRouter": False, "Llama4Router": True}


@dataclass(frozen=True)
class RouterLosses:
    """Means over tokens.

    Attributes:
        load_balance, aux: over all layers.
        load: `[L, E]` each expert's share of its layer's assignments.
        entropy: `[L]` of the routers' distributions, in nats; no gradient.
    """

    load_balance: Tensor
    aux: Tensor
    load: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Routing:
    """What one layer's router decided.

    Attributes:
        logits: `[N, E]`, before softmax or sigmoid.
        chosen: `[N, K]` experts.
        sigmoid: True when experts are scored each for itself.
    """

    logits: Tensor
    chosen: Tensor
    sigmoid: bool = False

    def log_probs(self) -> Tensor:
        """Log-probabilities of the experts `[N, E]` in float32; of sigmoids each one's share of their sum."""
        z = self.logits.float()
        return (torch.nn.functional.logsigmoid(z) if self.sigmoid else z).log_softmax(dim=-1)


def router_losses(routings: Sequence[Routing], tokens: Tensor | None, kind: str = "z") -> RouterLosses:
    """The routers' losses, differentiable.

    Args:
        routings: one a layer.
        tokens: `[N]` True for tokens that count; None: all do.
        kind: what `aux` is: z or entropy.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in ("z", "entropy"):
        raise ConfigError(f"loss.router_aux_kind is {kind!r}; choose z or entropy.")
    flat = None if tokens is None else tokens.reshape(-1)
    experts = max(routing.logits.shape[-1] for routing in routings)
    balance, aux, load, entropies = [], [], [], []
    for routing in routings:
        z, chosen = routing.logits.float(), routing.chosen
        if flat is not None:
            kept = flat.to(z.device)
            z, chosen = z[kept], chosen[kept]
        log_p = Routing(z, chosen, routing.sigmoid).log_probs()
        p = log_p.exp()
        share = torch.bincount(chosen.reshape(-1), minlength=z.shape[-1]).to(p.dtype) / max(chosen.numel(), 1)
        count = max(len(z), 1)
        balance.append(z.shape[-1] * (share * p.sum(dim=0) / count).sum())
        entropy = -(p * log_p).sum(dim=-1)
        per_token = z.logsumexp(dim=-1).square() if kind == "z" else entropy
        aux.append(per_token.sum() / count)
        entropies.append(entropy.detach().sum() / count)
        load.append(torch.nn.functional.pad(share, (0, experts - len(share))))
    return RouterLosses(torch.stack(balance).mean(), torch.stack(aux).mean(), torch.stack(load), torch.stack(entropies))


class RouterTap:
    """Listens to a model's routers.

    Args:
        model: a causal LM of transformers; its classes name their routers in `_can_record_outputs`.

    Attributes:
        problem: why the routers' decisions can not be told; None when they can, or when there are no routers.
    """

    def __init__(self, model: Any) -> None:
        self.problem: str | None = None
        self._records: list[tuple[torch.nn.Module, Tensor, tuple[Any, ...]]] | None = None
        self._sigmoid: bool | None = None
        self._top_k = _experts_per_token(model.config)
        self.routers = find_routers(model)
        if not self.routers and any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()):
            self.problem = f"{type(model).__name__} has experts and does not name its routers"
        for module, index in self.routers:
            module.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if self._records is not None:
                parts = output if isinstance(output, tuple) else (output,)
                self._records.append((module, parts[index], parts))

        return record

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen while the context lasts; `routings` tells inside it what has been decided so far."""
        self._records = []
        try:
            yield
        finally:
            self._records = None

    def routings(self) -> list[Routing]:
        """A Routing for each layer that has been passed; none where the decisions can not be told."""
        return [self._routing(*record) for record in self._records or []] if self.problem is None else []

    def learn(self) -> None:
        """Find out from what has just been recorded how these routers score and choose; call it inside `recording`."""
        for module, logits, parts in self._records or []:
            name = type(module).__name__
            if logits.ndim != 2:
                self.problem = f"{name} routes by logits of shape {tuple(logits.shape)}"
                return
            if bool((logits >= 0).all() and (logits.float().sum(dim=-1) - 1.0).abs().max() < 1e-3):
                self.problem = f"{name} passes on probabilities and no logits"
                return
            chosen = _chosen(logits, parts)
            if chosen is None and name not in _BY_LOGITS:
                self.problem = f"{name} does not tell which experts it chose"
                return
            if self._sigmoid is None:
                self._sigmoid = _BY_LOGITS[name] if chosen is None else _scores_by_sigmoid(logits, chosen, parts)
            if self._sigmoid is None:  # its weights do not tell; a correction of the choice belongs to sigmoids
                self._sigmoid = hasattr(module, "e_score_correction_bias")

    def _routing(self, module: torch.nn.Module, logits: Tensor, parts: tuple[Any, ...]) -> Routing:
        chosen = _chosen(logits, parts)
        if chosen is None:
            chosen = logits.detach().topk(int(getattr(module, "top_k", self._top_k)), dim=-1).indices
        return Routing(logits, chosen, bool(self._sigmoid))


def find_routers(model: Any) -> list[tuple[torch.nn.Module, int]]:
    """The router modules, each once, with the place of the logits in their outputs."""
    found: dict[torch.nn.Module, int] = {}
    for owner in model.modules():
        listed = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in listed if isinstance(listed, list) else [listed] if listed is not None else []:
            kind: Any = getattr(recorder, "target_class", recorder)
            place = getattr(recorder, "layer_name", None) or ""
            for name, module in owner.named_modules():
                if isinstance(module, kind) and place in name:
                    found[module] = getattr(recorder, "index", 0)
    # An attention layer that passes on what a router inside it says is no router of its own (JetMoE).
    outer = [module for module in found if any(part in found for part in module.modules() if part is not module)]
    return [(module, index) for module, index in found.items() if module not in outer]


def _chosen(logits: Tensor, parts: tuple[Any, ...]) -> Tensor | None:
    """The expert numbers `[N, K]` among a router's outputs."""
    for part in parts:
        numbers = isinstance(part, Tensor) and part.dtype in (torch.int64, torch.int32) and part.ndim == 2
        if numbers and len(part) == len(logits) and part.shape[1] <= logits.shape[1]:
            return part  # type: ignore[no-any-return]
    return None


def _scores_by_sigmoid(logits: Tensor, chosen: Tensor, parts: tuple[Any, ...]) -> bool | None:
    """True when the weights a router gives its choice are in the proportion of sigmoids, False of a softmax.

    None when there are none, or when a single expert is chosen and always has the same weight.
    """
    for part in parts:
        if not isinstance(part, Tensor) or part is logits or not part.is_floating_point() or part.ndim != 2:
            continue
        if part.shape not in (chosen.shape, logits.shape):
            continue
        weights = (part if part.shape == chosen.shape else part.gather(1, chosen)).float()
        weights = weights.detach()
        if chosen.shape[1] == 1 and float(weights.max() - weights.min()) < 1e-6:
            return None
        errors = []
        for scores in (logits.float().sigmoid(), logits.float().softmax(dim=-1)):
            taken = scores.gather(1, chosen)
            if chosen.shape[1] > 1:  # routers differ in whether and how they scale their weights
                taken, weights = (x / x.sum(dim=-1, keepdim=True) for x in (taken, weights))
            errors.append(float((taken - weights).abs().sum()))
        return errors[0] < errors[1]
    return None


def _experts_per_token(config: Any) -> int:
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return int(getattr(getattr(config, "ffn_config", None), "moe_top_k", 1))
