"""Decoders of transformers with mHC-lite streams: `mhc_llama`, `mhc_qwen3` and so on.

The one idea: a decoder layer is x + attention(norm x), then x + mlp(norm x); with streams both additions become
hyper-connections, everything else is the architecture's own code. Streams travel between layers side by side as
`[B, T, N·D]`, so the model around the layers does not know of them: the first layer copies, the last takes the mean.
A model with streams has a `model_type` of its own, because what reads it without them would read another model.

Shapes: B rows, T positions, N streams, D width.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from limbeck.errors import ConfigError
from limbeck.registration import MHC_BASES, MHC_PREFIX
from limbeck.students.mhc.connection import FORMS, MOST_STREAMS, HyperConnection
from limbeck.students.mixing import OwnInit, derived_config, derived_model, mixed_class, retype_body

Tensor = torch.Tensor


class StreamedLayer(nn.Module):
    """Mixed into a decoder layer's class: the same sublayers between hyper-connections."""

    def connect(self, config: Any, number: int, count: int) -> None:
        """Add the connections of layer `number` of `count`."""
        self.is_first, self.is_last = number == 0, number == count - 1
        self.streams = config.mhc_streams
        settings = (config.mhc_form == "dynamic", config.rms_norm_eps)
        self.mhc_attention = HyperConnection(self.streams, config.hidden_size, 2 * number, *settings)
        self.mhc_mlp = HyperConnection(self.streams, config.hidden_size, 2 * number + 1, *settings)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, D]` or `[B, T, N·D]` in; out the same, or the mean of the streams after the last layer."""
        layer: Any = self
        if self.is_first:
            streams = hidden_states.unsqueeze(-2).expand(*hidden_states.shape[:-1], self.streams, -1)
        else:
            streams = hidden_states.reshape(*hidden_states.shape[:-1], self.streams, -1)
        streams = self.mhc_attention(
            streams, lambda x: layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
        )
        streams = self.mhc_mlp(streams, lambda x: layer.mlp(layer.post_attention_layernorm(x)))
        result: Tensor = streams.mean(dim=-2) if self.is_last else streams.flatten(-2)
        return result


class Streamed(OwnInit):
    """Mixed into a causal LM's class: streams are connected once the model is made."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the architecture's own
        connect_streams(self)


@cache
def streamed_config(base: str) -> Any:
    """The config class of `mhc_BASE`."""
    fields = {"mhc_streams": (int, 2), "mhc_form": (str, "dynamic")}
    doc = "with N = `mhc_streams` residual streams, mixed in `mhc_form`."
    return derived_config(MHC_PREFIX + base, base, "MHC", fields, _validate_streams, doc)


def _validate_streams(config: Any) -> None:
    if not 1 <= config.mhc_streams <= MOST_STREAMS:
        raise ValueError(f"mhc_streams is {config.mhc_streams}; choose 1 to {MOST_STREAMS}")
    if config.mhc_form not in FORMS:
        raise ValueError(f"mhc_form is {config.mhc_form!r}; choose {' or '.join(FORMS)}")


@cache
def streamed_model(base: str) -> Any:
    """The causal LM class of `mhc_BASE`."""
    return derived_model(streamed_config(base), base, "MHC", Streamed)


def connect_streams(model: Any) -> None:
    """Turn the decoder layers of a model, whose config names the streams, into layers with streams."""
    config, layers = model.config, model.model.layers
    retype_body(model)  # the hidden states that it may record are `[B, T, N·D]` inside
    for number, layer in enumerate(layers):
        layer.__class__ = mixed_class(StreamedLayer, layer.__class__)
        layer.connect(config, number, len(layers))
        weight = next(layer.self_attn.parameters())
        for connection in (layer.mhc_attention, layer.mhc_mlp):
            connection.to(dtype=weight.dtype, device=weight.device)


def add_streams(model: Any, streams: int, form: str) -> None:
    """Give a causal LM streams, in place; what it computes stays what it was.

    Args:
        model: of one of the architectures in `MHC_BASES`, or one that has these streams already.
        streams: N.
        form: dynamic or static.

    Raises:
        ConfigError: another architecture, or other streams.
    """
    base = model.config.model_type
    if base.startswith(MHC_PREFIX):
        held = (model.config.mhc_streams, model.config.mhc_form)
        if held != (streams, form):
            raise ConfigError(
                f"student.mhc is {streams} streams, {form}, and the weights have {held[0]}, {held[1]}. Leave "
                "student.mhc out to go on with theirs."
            )
        return
    if base not in MHC_BASES:
        raise ConfigError(
            f"student.mhc is set and model_type {base} is no decoder that takes streams; those are "
            f"{', '.join(MHC_BASES)}."
        )
    if type(model) is not MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]:
        raise ConfigError(
            f"student.mhc is set and the student is a {type(model).__name__}, code of its own over {base}, which "
            "streams would leave out. Give streams to a model of transformers."
        )
    model.config.__class__ = streamed_config(base)
    model.config.mhc_streams, model.config.mhc_form = streams, form
    model.__class__ = streamed_model(base)
    model.config.architectures = [type(model).__name__]
    connect_streams(model)
