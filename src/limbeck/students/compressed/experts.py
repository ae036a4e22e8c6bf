"""Routed experts in fewer weights, each a module with the call of transformers' fused experts.

    latent        E_e(x) = U D_e (silu(A_e^g z) ⊙ A_e^u z),  z = V x once a token; A_e, D_e are fused experts of width R
    shared_core   W_e = (I + U_e^out V_e^out) C (I + U_e^in V_e^in), a core C for each of gate, up and down
    core_delta    W_e = B + U_e V_e, a base B for each of gate, up and down
    prune         fewer experts, and a router of as many

The one idea: a layer is described by `{"method": NAME, "rank": R}` (`{"method": "prune", "experts": n}`) in the model's
config, and the module follows from that and from the class of the layer's own experts. Matrices that stand for whole
experts keep their fused 3-D layout or are linear layers, so ternary weights, Muon and grouped products apply to them.

Shapes: N tokens, K chosen experts, S = N·K pairs, E experts, H hidden width, I width inside an expert, R rank.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from limbeck.errors import ConfigError
from limbeck.students.mixing import OwnModule, mixed_class

Tensor = torch.Tensor
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: What the description of a layer has beside its method.
LAYER_KEYS = {"latent": "rank", "shared_core": "rank", "core_delta": "rank", "prune": "experts"}


class LatentExperts(nn.Module):
    """Mixed into a fused experts' class of width R: hidden states are brought to R and back once a token."""

    def connect(self, width: int, rank: int) -> None:
        """Add V `[R, H]` and U `[H, R]`."""
        self.encoder = nn.Linear(width, rank, bias=False)
        self.decoder = nn.Linear(rank, width, bias=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, H]` to `[N, H]`."""
        inside = super().forward(self.encoder(hidden_states), top_k_index, top_k_weights)
        result: Tensor = self.decoder(inside)
        return result


class Pairs:
    """The pairs of a token and an expert that it chose, sorted by expert.

    Args:
        chosen: `[N, K]` experts.
        experts: E.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        flat = chosen.reshape(-1)
        self._order = flat.argsort(stable=True)
        self._shape = chosen.shape
        self.tokens = self._order // chosen.shape[1]
        self._counts = torch.bincount(flat, minlength=experts)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x `[S, C]` by each pair's own of the weights `[E, R, C]`: `[S, R]`."""
        sizes = weights.shape[-1] % 8 == 0 and weights.shape[-2] % 8 == 0
        if sizes and _has_grouped_products(x):
            offsets = self._counts.cumsum(dim=0).to(torch.int32)
            return nn.functional.grouped_mm(x, weights.to(x.dtype).mT, offs=offsets)
        parts = torch.split(x, self._counts.tolist())
        return torch.cat([part @ weight.to(x.dtype).mT for part, weight in zip(parts, weights, strict=True)])

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Σ over a token's pairs of weight · y: `[S, D]` to `[N, D]`, always summed in the same order."""
        placed = torch.empty_like(self._order)
        placed[self._order] = torch.arange(len(self._order), device=y.device)
        whole = y[placed].reshape(*self._shape, -1)
        summed: Tensor = (whole * weights.unsqueeze(-1).to(y.dtype)).sum(dim=1)
        return summed


def _has_grouped_products(x: Tensor) -> bool:
    """True where torch multiplies groups of rows like x at once."""
    if x.dtype == torch.float64 or (torch.compiler.is_compiling() and x.dtype != torch.bfloat16):
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)


class ExpertFactors(OwnModule):
    """Pairs of low-rank factors for each expert: `NAME_u` `[E, out, R]` and `NAME_v` `[E, R, in]`; U is 0 at first.

    Args:
        experts: E.
        rank: R; 0: there are no factors.
        sizes: name -> (out, in).
        std: of V at first.
    """

    is_transposed = False
    is_low_rank = True

    def __init__(self, experts: int, rank: int, sizes: Mapping[str, tuple[int, int]], std: float) -> None:
        super().__init__()
        self._std, self._rank = std, rank
        for name, (out, into) in sizes.items() if rank else ():
            self.register_parameter(f"{name}_u", nn.Parameter(torch.empty(experts, out, rank)))
            self.register_parameter(f"{name}_v", nn.Parameter(torch.empty(experts, rank, into)))

    def initial(self) -> dict[str, Tensor]:
        """U 0, V normal: at first there is nothing but what the experts share."""
        return {
            name: torch.zeros(value.shape) if name.endswith("_u") else torch.randn(value.shape) * self._std
            for name, value in self.named_parameters()
        }

    def apply_to(self, name: str, x: Tensor, pairs: Pairs) -> Tensor | float:
        """U_e V_e x of each pair, `[S, in]` to `[S, out]`; 0 where there are none."""
        if not self._rank:
            return 0.0
        return pairs.product(pairs.product(x, getattr(self, f"{name}_v")), getattr(self, f"{name}_u"))


class _SharedExperts(nn.Module):
    """Experts around matrices that they share: `shared_core` for each projection, and a `wrapper` of low rank.

    Args:
        config: the model's.
        sizes: E, H, I.
        rank: R.
    """

    def __init__(self, config: Any, sizes: tuple[int, int, int], rank: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = sizes
        shapes = dict(zip(PROJECTIONS, self._shapes(), strict=True))
        self.shared_core = nn.ModuleDict(
            {name: nn.Linear(into, out, bias=False) for name, (out, into) in shapes.items()}
        )
        self.wrapper = ExpertFactors(self.num_experts, rank, self.factor_sizes(shapes), config.initializer_range)
        self.act_fn = ACT2FN[config.hidden_act]

    def _shapes(self) -> list[tuple[int, int]]:
        up, down = (self.intermediate_dim, self.hidden_dim), (self.hidden_dim, self.intermediate_dim)
        return [up, up, down]

    def factor_sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The wrapper's factors by name, as (out, in)."""
        raise NotImplementedError


class SharedCoreExperts(_SharedExperts):
    """W_e = (I + U_e^out V_e^out) C (I + U_e^in V_e^in)."""

    def factor_sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Two for each projection, on either side of its core."""
        found = {}
        for name, (out, into) in shapes.items():
            found[f"{name}_in"], found[f"{name}_out"] = (into, into), (out, out)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, H]` to `[N, H]`."""
        pairs = Pairs(top_k_index, self.num_experts)
        x = hidden_states[pairs.tokens]
        inside = self.act_fn(self._project("gate_proj", x, pairs)) * self._project("up_proj", x, pairs)
        return pairs.combine(self._project("down_proj", inside, pairs), top_k_weights)

    def _project(self, name: str, x: Tensor, pairs: Pairs) -> Tensor:
        y = self.shared_core[name](x + self.wrapper.apply_to(f"{name}_in", x, pairs))
        result: Tensor = y + self.wrapper.apply_to(f"{name}_out", y, pairs)
        return result


class CoreDeltaExperts(_SharedExperts):
    """W_e = B + U_e V_e; what goes through a base is computed once a token."""

    def factor_sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """One for each projection."""
        return dict(shapes)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, H]` to `[N, H]`."""
        pairs = Pairs(top_k_index, self.num_experts)
        x, core, delta = hidden_states[pairs.tokens], self.shared_core, self.wrapper
        gate, up = (
            core[name](hidden_states)[pairs.tokens] + delta.apply_to(name, x, pairs) for name in PROJECTIONS[:2]
        )
        inside = self.act_fn(gate) * up
        shared = core["down_proj"](pairs.combine(inside, top_k_weights))
        own = delta.apply_to("down_proj", inside, pairs)
        whole: Tensor = shared + pairs.combine(own, top_k_weights) if isinstance(own, Tensor) else shared
        return whole


def check_layer(layer: Mapping[str, Any]) -> None:
    """Refuse a layer's description that stands for no module.

    Raises:
        ConfigError: an unknown method, or not exactly its number.
    """
    method = layer.get("method")
    key = LAYER_KEYS.get(str(method))
    if key is None:
        raise ConfigError(f"expert_layers has method {method!r}; choose one of {', '.join(LAYER_KEYS)}.")
    least = 0 if method in ("shared_core", "core_delta") else 1
    value = layer.get(key)
    if layer.keys() != {"method", key} or not isinstance(value, int) or value < least:
        raise ConfigError(f"expert_layers has {dict(layer)}; {method} has `{key}`, a number of at least {least}.")


def compressed_experts(original: nn.Module, config: Any, layer: Mapping[str, Any]) -> nn.Module:
    """The experts of a layer's description, with weights that are yet to be given.

    Args:
        original: the layer's own fused experts, for their class and sizes; they may be on the meta device.
        config: the model's, which they will read.
        layer: `{"method": …}`.
    """
    check_layer(layer)
    held: Any = original
    sizes = (held.num_experts, held.hidden_dim, held.intermediate_dim)
    method = layer["method"]
    if method == "shared_core":
        return SharedCoreExperts(config, sizes, layer["rank"])
    if method == "core_delta":
        return CoreDeltaExperts(config, sizes, layer["rank"])
    kind: Any = type(original)
    narrow = copy.copy(config)
    if method == "prune":
        set_experts(narrow, layer["experts"])
        made = kind(narrow)
    else:
        narrow.hidden_size = layer["rank"]
        made = mixed_class(LatentExperts, kind)(narrow)
        made.connect(sizes[1], layer["rank"])
    made.config = config  # the model's own: what is chosen there later holds for these experts too
    return made  # type: ignore[no-any-return]


def set_experts(config: Any, experts: int) -> None:
    """Change how many experts a config has, and how many of them a token takes at most."""
    config.num_experts = experts
    if "num_local_experts" in config.to_dict():
        config.num_local_experts = experts
    config.num_experts_per_tok = min(config.num_experts_per_tok, experts)
