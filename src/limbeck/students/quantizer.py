"""Ternary checkpoints for `AutoModelForCausalLM.from_pretrained`: shadow weights, or packed codes and scales.

The one idea: `quantization_config` in a checkpoint's config names our method; transformers then asks this
quantizer (see `limbeck.registration`), which makes the same modules as training did. Two formats: `shadow`
(full-precision weights under their usual names, trainable) and `packed` (2-bit codes and float16 scales, for
inference).

Packed: four codes a byte, code + 1 of input 4b + j in bits 2j of byte b.
Shapes: R rows, C columns, G group, E experts.
"""

import re
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from limbeck.errors import ConfigError
from limbeck.registration import METHOD
from limbeck.students.ternary import (
    TernaryState,
    TernaryTensor,
    apply_ternary,
    as_matrix,
    group_width,
    round_activations,
    use_own_experts,
)
from limbeck.students.weights_file import KEY

Tensor = torch.Tensor


class TernaryQuantizationConfig(QuantizationConfigMixin):
    """What a ternary checkpoint says of itself.

    Attributes:
        format: shadow or packed.
        weights: names of the ternary parameters.
        group_size, scale, activation_bits: as in training.
        float8: with `packed`, names of the other matrices, stored as float8 (E4M3) with a scale a row.
        weights_file: where the weights lie (see `weights_file.py`); default where transformers looks.
    """

    def __init__(
        self,
        format: str = "shadow",  # noqa: A002 (a key of the file)
        weights: list[str] | None = None,
        group_size: int | str = 128,
        scale: str = "absmean",
        activation_bits: int | None = 8,
        float8: list[str] | None = None,
        weights_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        if format not in ("shadow", "packed"):
            raise ConfigError(f"quantization_config.format is {format!r}; this limbeck reads shadow and packed.")
        self.quant_method = METHOD
        self.format, self.weights, self.group_size = format, list(weights or []), group_size
        self.scale, self.activation_bits, self.float8 = scale, activation_bits, list(float8 or [])
        if weights_file is not None:  # a name that is saved again only by who renames the file
            self.weights_file = weights_file

    @property
    def state(self) -> TernaryState:
        """The settings of the forward pass."""
        return TernaryState(self.group_size, self.scale, self.activation_bits)


class TernaryQuantizer(HfQuantizer):
    """Makes the modules that a ternary checkpoint's tensors go into."""

    requires_calibration = False

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the model's config: it tells transformers which file to load."""
        named = getattr(self.quantization_config, KEY, None)
        if named is not None:
            config.transformers_weights = named
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config: TernaryQuantizationConfig = self.quantization_config
        if config.format == "shadow":
            apply_ternary(model, config.weights, config.state)
        else:
            make_packed(model, config)
            hold_float8(model, config.float8)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        release_float8(model, self.quantization_config.float8)
        self.quantization_config.float8 = []  # they are ordinary parameters now
        if hasattr(self.quantization_config, KEY):
            delattr(self.quantization_config, KEY)  # of the file that was read; another may be written
        return model

    @property
    def is_trainable(self) -> bool:
        """Shadow weights are; codes are not."""
        return bool(self.quantization_config.format == "shadow")

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`."""
        return self.is_trainable

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Both formats are written under the names they are read by."""
        return True


def pack_codes(codes: Tensor) -> Tensor:
    """int8 `[..., C]` in −1, 0, 1 to uint8 `[..., ⌈C/4⌉]`; what fills up the last byte is 0."""
    whole = nn.functional.pad(codes, (0, -codes.shape[-1] % 4))
    fields = (whole + 1).to(torch.uint8).reshape(*codes.shape[:-1], -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
    return (fields << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, columns: int | None = None) -> Tensor:
    """The inverse of `pack_codes`, for C columns; default all that the bytes hold."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & 3
    return (fields.to(torch.int8).flatten(-2) - 1)[..., :columns]


class PackedWeight(nn.Module):
    """A ternary matrix (or one an expert) as it is stored: `codes` uint8 `[…, R, ⌈C/4⌉]`, `scales` `[…, R, C/G]`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: torch.Size, group_size: int | str) -> None:
        super().__init__()
        width = group_width(shape[-1], group_size)
        self._columns = shape[-1]
        self.register_buffer("codes", torch.zeros(*shape[:-1], -(-shape[-1] // 4), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(*shape[:-1], shape[-1] // width, dtype=torch.float16))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """s·code `[..., R, C]`."""
        return TernaryTensor(unpack_codes(self.codes, self._columns), self.scales).dequantise().to(dtype)


class PackedLinear(nn.Module):
    """A linear layer over packed ternary weights."""

    def __init__(self, linear: nn.Module, state: TernaryState) -> None:
        super().__init__()
        shape = as_matrix(linear, cast(Tensor, linear.weight)).shape
        self.packed = PackedWeight(shape, state.group_size)
        self.bias = cast(nn.Parameter | None, linear.bias)
        self.out_features, self.in_features = shape
        self._bits = state.activation_bits

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """`[..., C]` to `[..., R]`."""
        x = round_activations(input, self._bits)
        return nn.functional.linear(x, self.packed.dequantise(x.dtype), self.bias)


def make_packed(model: Any, config: TernaryQuantizationConfig) -> None:
    """Put packed modules in place of a model's ternary weights, ready for a packed checkpoint's tensors."""
    state = config.state
    for name in config.weights:
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if isinstance(module, nn.Linear | Conv1D):
            owner, _, child = prefix.rpartition(".")
            parent = model.get_submodule(owner)
            setattr(parent, child, PackedLinear(module, state))
            if isinstance(module, Conv1D):  # GPT-2's initialisation looks into its layers for weights
                parent._is_hf_initialized = True
            continue
        packed = PackedWeight(getattr(module, leaf).shape, state.group_size)
        delattr(module, leaf)
        module.add_module(f"{leaf}_packed", packed)
        module.ternary_weights = (*getattr(module, "ternary_weights", ()), leaf)
        module.ternary = state
        module._is_hf_initialized = True  # its initialisation would look for the weight that is gone
    if any(hasattr(module, "ternary_weights") for module in model.modules()):
        use_own_experts(model)


class Float8Weight(nn.Module):
    """A matrix as it is stored: `values` float8 E4M3 `[R, C]` and a float32 scale a row."""

    values: Tensor
    scales: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float8_e4m3fn))
        self.register_buffer("scales", torch.ones(shape[0], 1, dtype=torch.float32))


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of a matrix; a row's largest entry becomes 448, the largest of E4M3."""
    scales = weight.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 448.0
    return (weight.float() / scales).to(torch.float8_e4m3fn), scales


def packed_key(name: str) -> str:
    """Where a ternary weight's packed form lies: beside a linear layer's weight, or beside an experts' tensor."""
    return f"{name.removesuffix('.weight')}.packed" if name.endswith(".weight") else f"{name}_packed"


def _one_word(name: str) -> str:
    """A parameter's name as one module's name: dots would be modules inside it."""
    return name.replace(".", "/")


def float8_key(name: str) -> str:
    """Where a matrix's float8 form lies in a checkpoint."""
    return f"float8.{_one_word(name)}"


def hold_float8(model: Any, names: list[str]) -> None:
    """Give float8 tensors of a checkpoint a place to be loaded into; their parameters are filled afterwards."""
    if not names:
        return
    held = nn.ModuleDict({_one_word(name): Float8Weight(model.get_parameter(name).shape) for name in names})
    model.add_module("float8", held)
    # A head that is its embedding has nothing to be tied to before the embedding is filled.
    model.float8_ties, model.all_tied_weights_keys = model.all_tied_weights_keys, {}
    missing = {re.escape(name) for name in (*names, *model.float8_ties)}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or []), *missing}


@torch.no_grad()
def release_float8(model: Any, names: list[str]) -> None:
    """Fill the parameters from their float8 form and drop it."""
    for name in names:
        stored = model.float8[_one_word(name)]
        parameter = model.get_parameter(name)
        parameter.copy_((stored.values.float() * stored.scales).to(parameter.dtype))
    if names:
        del model.float8
        model.all_tied_weights_keys = model.float8_ties
        del model.float8_ties
        model.tie_weights()
