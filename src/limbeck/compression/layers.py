"""One layer of a checkpoint on its way through compression: measured on calibration text, then made smaller.

The one idea: a layer of routed experts and a dense one have the same three moments (listen, pass the text through, give
the smaller tensors and how far they are off), so whoever streams layers need not know which is which.

Shapes: N tokens, H hidden width, E experts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.compression.factors import FACTORISATIONS, rank_for
from limbeck.compression.pruning import kept_experts, prune_channels, without_experts
from limbeck.compression.refit import refit_latent
from limbeck.compression.statistics import ExpertStatistics
from limbeck.config.compress import CompressConfig
from limbeck.errors import ConfigError
from limbeck.students.compressed.experts import compressed_experts, set_experts
from limbeck.students.compressed.models import routed_block

Tensor = torch.Tensor
_SAMPLE = 2048  # tokens on which a smaller layer is compared with the layer


@dataclass(frozen=True)
class SmallerLayer:
    """What takes the place of a layer's feed-forward part.

    Attributes:
        description: of `expert_layers`, or of what became of a dense layer.
        tensors: by their names inside the layer; others stay as they were.
        error: ‖y − ŷ‖ / ‖y‖ of what the part gives for a sample of its inputs.
        before: weights of the exchanged part.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    error: float
    before: int

    @property
    def after(self) -> int:
        """Weights of what takes its place."""
        return sum(tensor.numel() for tensor in self.tensors.values())


class _Inputs:
    """What a part of the layer gets of the calibration text.

    Args:
        store: `[N, H]` that is filled, mapped from a file; None: no text.
    """

    def __init__(self, store: Tensor | None) -> None:
        self._store, self._held = store, 0

    def add(self, x: Tensor) -> None:
        """Take x `[n, H]`."""
        assert self._store is not None
        self._store[self._held : self._held + len(x)] = x.to(self._store)
        self._held += len(x)

    @property
    def all(self) -> Tensor:
        """`[n, H]` whatever came."""
        assert self._store is not None
        return self._store[: self._held]

    def sample(self, like: Tensor, width: int) -> Tensor:
        """The first tokens `[n, H]`; without a text normal noise."""
        if self._store is not None:
            return self.all[:_SAMPLE].to(like)
        noise = torch.randn(512, width, generator=torch.Generator().manual_seed(0))
        return noise.to(like)


class RoutedLayer:
    """A layer's routed experts.

    Args:
        layer: the decoder layer.
        config: that of the model around the layer.
        section: what is to be done.
        store: where what the experts get of the calibration text is kept, `[N, H]`; None: there is no text.
    """

    def __init__(self, layer: Any, config: Any, section: CompressConfig, store: Tensor | None) -> None:
        block: Any = routed_block(layer)
        self.block, self.config, self.section = block, config, section
        held = block.experts
        self._sizes = (held.num_experts, held.hidden_dim, held.intermediate_dim)
        self._inputs = _Inputs(store)
        if store is not None:
            self.statistics = ExpertStatistics.empty(*self._sizes, device=held.down_proj.device)
        else:
            self.statistics = ExpertStatistics.without_data(self._sizes[0], held.down_proj.device)

    def listen(self, counted: Tensor) -> None:
        """Measure what passes from now on; `counted` `[B, T]` is True for tokens that are no filler."""
        experts, flat = self.block.experts, counted.reshape(-1)

        def observed(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            self._inputs.add(hidden[flat])
            return self.statistics.observe(experts, hidden, chosen, weights, flat)

        experts.forward = observed

    @torch.no_grad()
    def smaller(self) -> SmallerLayer:
        """The layer's experts in fewer weights."""
        experts = self.block.experts
        experts.__dict__.pop("forward", None)
        if self.statistics.inputs is not None:
            self.statistics.finish()
        x = self._inputs.sample(experts.down_proj, self._sizes[1])
        wanted = _routed(self.block.gate, experts, x)
        whole = sum(parameter.numel() for parameter in experts.parameters())
        found: SmallerLayer | None = None
        for description in candidates(self.section, self.config, self._sizes, self.statistics.inputs is not None):
            tensors = self._tensors(description)
            error = self._error(description, tensors, x, wanted)
            before = whole + (self.block.gate.weight.numel() if description["method"] == "prune" else 0)
            if found is None or error < found.error:
                found = SmallerLayer(description, tensors, error, before)
        assert found is not None
        return found

    def _tensors(self, description: Mapping[str, Any]) -> dict[str, Tensor]:
        """By names inside the layer."""
        experts, method = self.block.experts, description["method"]
        if method != "prune":
            made = FACTORISATIONS[method](experts, self.statistics, description["rank"])
            if method == "latent" and self.statistics.inputs is not None:
                refit_latent(experts, self.block.gate, self._inputs.all, made)
            return {f"mlp.experts.{name}": value for name, value in made.items()}
        kept = kept_experts(self.statistics, description["experts"])
        made = {f"mlp.experts.{name}": value for name, value in without_experts(experts, kept).items()}
        return {**made, "mlp.gate.weight": self.block.gate.weight[kept]}

    def _error(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor], x: Tensor, wanted: Tensor) -> float:
        experts, gate = self.block.experts, self.block.gate
        with torch.device("meta"):
            made: Any = compressed_experts(experts, self.config, description)
            if description["method"] == "prune":
                narrow = copy.copy(self.config)
                set_experts(narrow, description["experts"])
                gate = type(gate)(narrow)
        own = {name.removeprefix("mlp.experts."): value.to(x) for name, value in tensors.items() if "experts." in name}
        made.load_state_dict(own, assign=True)
        if description["method"] == "prune":
            gate.load_state_dict({"weight": tensors["mlp.gate.weight"].to(x)}, assign=True)
        return _relative(_routed(gate, made, x), wanted)


def candidates(
    section: CompressConfig, config: Any, sizes: tuple[int, int, int], has_text: bool
) -> list[dict[str, Any]]:
    """The forms that a layer's experts may take: one, or with `auto` all that keep the share.

    Args:
        section: what is to be done.
        config: of a model with these experts.
        sizes: E, H, and the width inside an expert.
        has_text: there is calibration text.

    Raises:
        ConfigError: none fits.
    """
    experts, hidden, inside = sizes
    count, least = max(1, round(section.share * experts)), int(config.num_experts_per_tok)
    found: list[dict[str, Any]] = []
    if section.method in ("prune", "auto") and has_text and count >= least:
        found.append({"method": "prune", "experts": count})
    for method in FACTORISATIONS:
        if section.method not in (method, "auto"):
            continue
        rank = section.rank if section.rank is not None else rank_for(method, section.share, *sizes)
        if rank or section.rank is not None:
            found.append({"method": method, "rank": rank})
    if found:
        return found
    if section.method == "prune" and not has_text:
        raise ConfigError(
            "compress.method is prune and there is no calibration text, which tells what an expert contributes. Give "
            "--calibration (in a recipe compress.calibration_rows), or another method."
        )
    if section.method == "prune":
        raise ConfigError(
            f"compress.keep {section.share:g} leaves {count} of {experts} experts and a token takes {least}. Keep at "
            f"least {least / experts:g}."
        )
    raise ConfigError(
        f"compress.keep {section.share:g} leaves {section.method} no rank of at least 8 for {experts} experts of "
        f"{inside} × {hidden}. Keep more, give compress.rank, or take another method."
    )


def _routed(gate: Any, experts: Any, x: Tensor) -> Tensor:
    """What the experts give, a part at a time so that their pairs stay few."""
    parts = []
    for part in torch.split(x, 512):
        _, weights, chosen = gate(part)
        parts.append(experts(part, chosen, weights))
    return torch.cat(parts)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm().clamp_min(1e-30))


class DenseLayer:
    """A layer's gated feed-forward part, or nothing of it where no width is asked for.

    Args:
        layer: the decoder layer.
        section: what is to be done.
        store: as a `RoutedLayer`'s.
    """

    def __init__(self, layer: Any, section: CompressConfig, store: Tensor | None) -> None:
        self.mlp, self.section = layer.mlp, section
        self._moment: Tensor | None = None
        self._inputs = _Inputs(store)
        self._hooks: list[Any] = []

    def listen(self, counted: Tensor) -> None:
        """Measure what passes from now on; `counted` `[B, T]` is True for tokens that are no filler."""
        for hook in self._hooks:
            hook.remove()
        if self.section.keep_ffn is None:
            return

        def inside(module: Any, given: Any) -> None:
            kept = given[0][counted].float()
            moment = (kept.mT @ kept).double()
            self._moment = moment if self._moment is None else self._moment + moment

        def whole(module: Any, given: Any) -> None:
            self._inputs.add(given[0][counted])

        self._hooks = [
            self.mlp.down_proj.register_forward_pre_hook(inside),
            self.mlp.register_forward_pre_hook(whole),
        ]

    @torch.no_grad()
    def smaller(self) -> SmallerLayer:
        """The layer with fewer channels."""
        for hook in self._hooks:
            hook.remove()
        keep, mlp = self.section.keep_ffn, self.mlp
        if keep is None:
            return SmallerLayer({"method": "none"}, {}, 0.0, 0)
        like = mlp.down_proj.weight
        x = self._inputs.sample(like, like.shape[0])
        tensors = prune_channels(mlp, self._moment, keep)
        held = {name: value.to(like) for name, value in tensors.items()}
        gate, up = (
            torch.nn.functional.linear(x, held[f"{name}.weight"], held.get(f"{name}.bias"))
            for name in ("gate_proj", "up_proj")
        )
        found = torch.nn.functional.linear(mlp.act_fn(gate) * up, held["down_proj.weight"], mlp.down_proj.bias)
        before = sum(parameter.numel() for name, parameter in mlp.named_parameters() if name in tensors)
        renamed = {f"mlp.{name}": value for name, value in tensors.items()}
        return SmallerLayer({"method": "channels", "channels": keep}, renamed, _relative(found, mlp(x)), before)
