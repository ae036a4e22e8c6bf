"""Ternary weights in training: full-precision shadows underneath, codes and scales in every forward pass.

The one idea: a weight is replaced by s·code only where it is used, straight-through, so that parameters,
their names, checkpoints and optimizers stay what they were. Scales are rounded to eight significant bits before they
are used, which float16, bfloat16 and float32 all hold: what training saw is what an export holds, to the bit, in
whichever of them it is computed.

    s = mean|w| (absmean) or max|w| (absmax) over a group of G inputs;  code = clip(round(w / s), −1, 1)
    w_eff = (1−λ) w + λ s·code,  ∂w_eff/∂w := 1;  activations: int8 per token, x ≈ round(127 x / max|x|)·max|x| / 127

Source: BitNet b1.58 (arXiv 2402.17764, eq. 1–3), with groups. λ rises from 0 to 1 over a warm-up.
Shapes: R rows (outputs), C columns (inputs), G group, E experts; leading dimensions are free.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from limbeck.errors import ConfigError

Tensor = torch.Tensor
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: below it a scale would lose bits
LARGEST_SCALE = 65280.0  # the largest bfloat16 that float16 holds
EXPERTS = "ternary_qat"


@dataclass
class TernaryState:
    """How a model's ternary weights are made; one object shared by all of them.

    Attributes:
        group_size: inputs that share a scale; `row` for one scale an output, `tensor` for one a matrix.
        scale: absmean or absmax.
        activation_bits: 8, or None for activations as they are.
        mix: λ: 0 uses the shadow weights, 1 the ternary ones.
    """

    group_size: int | str = 128
    scale: str = "absmean"
    activation_bits: int | None = 8
    mix: float = 1.0


@dataclass(frozen=True)
class TernaryTensor:
    """`codes` int8 `[..., R, C]` in −1, 0, 1 and `scales` float16 `[..., R, C/G]`."""

    codes: Tensor
    scales: Tensor

    def dequantise(self) -> Tensor:
        """s·code in float32."""
        groups = self.scales.shape[-1]
        shape = self.codes.shape
        grouped = self.codes.reshape(*shape[:-1], groups, shape[-1] // groups).float()
        return (grouped * self.scales.float().unsqueeze(-1)).reshape(shape)


def group_width(columns: int, group_size: int | str) -> int:
    """Inputs that share a scale in a row of `columns`.

    Raises:
        ConfigError: the row is no multiple of the group.
    """
    if isinstance(group_size, str):
        return columns
    if columns % group_size:
        raise ConfigError(
            f"student.ternary.group_size is {group_size} and a ternary weight has rows of {columns}, which is no "
            "multiple of it. Choose a group that divides it, or `row`."
        )
    return group_size


def _scales(magnitude: Tensor, group_size: int | str, scale: str) -> Tensor:
    """float32 scales `[..., R, C/G, 1]` that float16 and bfloat16 hold, of grouped magnitudes `[..., R, C/G, G]`."""
    s = magnitude.mean(dim=-1, keepdim=True) if scale == "absmean" else magnitude.amax(dim=-1, keepdim=True)
    if group_size == "tensor":  # the mean, or the largest, of the rows' is the matrix's own
        s = s.mean(dim=-3, keepdim=True) if scale == "absmean" else s.amax(dim=-3, keepdim=True)
        s = s.expand(*magnitude.shape[:-1], 1)
    return s.bfloat16().float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def quantise(weight: Tensor, group_size: int | str, scale: str) -> TernaryTensor:
    """Codes and scales of a shadow weight `[..., R, C]`: exactly those its forward pass uses."""
    codes, s = _codes_and_scales(weight, group_size, scale)
    return TernaryTensor(codes.to(torch.int8).reshape(weight.shape), s.squeeze(-1).half())


def _codes_and_scales(weight: Tensor, group_size: int | str, scale: str) -> tuple[Tensor, Tensor]:
    """float32 codes `[..., R, C/G, G]` and scales `[..., R, C/G, 1]`: the one place that rounds a weight."""
    width = group_width(weight.shape[-1], group_size)
    grouped = weight.detach().float().reshape(*weight.shape[:-1], weight.shape[-1] // width, width)
    s = _scales(grouped.abs(), group_size, scale)
    return (grouped / s).round_().clamp_(-1.0, 1.0), s


class _Ternarise(torch.autograd.Function):
    """w ↦ (1−λ) w + λ s·code with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int | str, scale: str, mix: float) -> Tensor:
        codes, s = _codes_and_scales(weight, group_size, scale)
        ternary = codes.mul_(s).reshape(weight.shape)
        if mix < 1.0:
            ternary = torch.lerp(weight.detach().float(), ternary, mix)
        return ternary.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return grad_outputs[0], None, None, None


class _RoundActivations(torch.autograd.Function):
    """x ↦ its int8 rounding per token, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        step = x.detach().float().abs().amax(dim=-1, keepdim=True).clamp_min_(1e-5).div_(127.0)
        return (x.detach() / step).round_().mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def ternarise(weight: Tensor, state: TernaryState) -> Tensor:
    """The weight that the forward pass uses, differentiable straight through."""
    if state.mix == 0.0:
        return weight
    result: Tensor = _Ternarise.apply(weight, state.group_size, state.scale, state.mix)  # type: ignore[no-untyped-call]
    return result


def round_activations(x: Tensor, bits: int | None) -> Tensor:
    """int8 activations per token (the last dimension), straight through; `None` leaves them."""
    return x if bits is None else _RoundActivations.apply(x)  # type: ignore[no-untyped-call]


class TernaryLinear(nn.Linear):
    """A linear layer whose weight is ternary in use. Made of an `nn.Linear` in place; its parameters are the same."""

    ternary: TernaryState

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """`[..., C]` to `[..., R]`."""
        x = round_activations(input, self.ternary.activation_bits)
        return nn.functional.linear(x, ternarise(self.weight, self.ternary), self.bias)


class TernaryConv1D(Conv1D):
    """GPT-2's linear layer, which stores its weight `[C, R]`: in use it is that of `TernaryLinear`, transposed."""

    ternary: TernaryState

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., R]`."""
        rounded = round_activations(x, self.ternary.activation_bits)
        return nn.functional.linear(rounded, ternarise(self.weight.mT, self.ternary), self.bias)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight as `[..., R, C]`, and back: GPT-2's layers store the transpose."""
    return weight.mT if isinstance(module, Conv1D) else weight


class _ExpertsView:
    """Experts as seen by their matrix products: the weights in use, the module for everything else."""

    def __init__(self, module: Any, **weights: Tensor) -> None:
        self._module = module
        self.__dict__.update(weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        state: TernaryState | None = getattr(self._module, "ternary", None)
        gated: Tensor = self._module._apply_gate(gate_up)
        return gated if state is None else round_activations(gated, state.activation_bits)


def own_experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Fused experts by transformers' grouped products: ternary ones, and those whose weights are on another device.

    grouped_mm wants dimensions that are multiples of 8; other sizes take the batched products.
    """
    state: TernaryState | None = getattr(module, "ternary", None)
    fits = module.hidden_dim % 8 == 0 and module.intermediate_dim % 8 == 0
    products = ALL_EXPERTS_FUNCTIONS["grouped_mm" if fits else "batched_mm"]
    in_use = {name: _in_use(module, name, hidden) for name in getattr(module, "ternary_weights", ())}
    for name, weight in module.named_parameters(recurse=False):
        if (
            name not in in_use and weight.device != hidden.device
        ):  # a layer that lives elsewhere comes when it is needed
            in_use[name] = weight.to(hidden.device)
    if not in_use:
        return products(module, hidden, top_k_index, top_k_weights)  # type: ignore[no-any-return]
    x = hidden if state is None else round_activations(hidden, state.activation_bits)
    return products(_ExpertsView(module, **in_use), x, top_k_index, top_k_weights)  # type: ignore[no-any-return]


def _in_use(module: Any, name: str, hidden: Tensor) -> Tensor:
    """An experts' weight as its products see it: a shadow's ternary form, or packed codes unpacked."""
    packed = getattr(module, f"{name}_packed", None)
    if packed is not None:
        unpacked: Tensor = packed.dequantise(hidden.dtype)
        return unpacked
    return ternarise(getattr(module, name).to(hidden.device), module.ternary)


def apply_ternary(model: Any, names: list[str], state: TernaryState) -> None:
    """Make the named weights of a model ternary in use.

    Args:
        model: a causal LM of transformers; parameters and their names do not change.
        names: full parameter names: weights of `nn.Linear`, of GPT-2's `Conv1D`, or fused 3-D experts.
        state: shared by all of them, kept as `model.ternary_state`.

    Raises:
        ConfigError: a name is neither, or its rows do not fit the groups.
    """
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        parameter = getattr(module, leaf)
        if type(module) in (nn.Linear, TernaryLinear) and leaf == "weight":
            module.__class__ = TernaryLinear
        elif type(module) in (Conv1D, TernaryConv1D) and leaf == "weight":
            module.__class__ = TernaryConv1D
        elif parameter.ndim == 3 and hasattr(module, "is_transposed") and not module.is_transposed:
            known = getattr(module, "ternary_weights", ())
            module.ternary_weights = tuple(sorted({*known, leaf}))
        else:
            raise ConfigError(
                f"student.ternary: {name} of {type(module).__name__} can not be made ternary; only the weights of "
                "nn.Linear, Conv1D and of fused experts stored [experts, out, in] can. Exclude it."
            )
        group_width(as_matrix(module, parameter).shape[-1], state.group_size)
        module.ternary = state
    if any(hasattr(module, "ternary_weights") for module in model.modules()):
        use_own_experts(model)
    model.ternary_state = state


def use_own_experts(model: Any) -> None:
    """Let the model's fused experts go through `own_experts_forward`."""
    if EXPERTS not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, own_experts_forward)
    model.set_experts_implementation(EXPERTS)


def ternary_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that are ternary in use, as `[..., R, C]`, with their names."""
    for prefix, module in model.named_modules():
        linear = isinstance(module, TernaryLinear | TernaryConv1D)
        for leaf in ("weight",) if linear else getattr(module, "ternary_weights", ()):
            yield f"{prefix}.{leaf}", as_matrix(module, getattr(module, leaf))
