"""Mixtures of experts of transformers whose experts are compressed: `compressed_qwen3_moe` and so on.

The one idea: everything but the experts is the architecture's own code. `expert_layers` in the config says of each
layer how its experts are held (see `experts.py`); null for a layer that has none, or has them as they were.
"""

import copy
from functools import cache
from typing import Any

from torch import nn

from limbeck.errors import ConfigError
from limbeck.registration import COMPRESSED_PREFIX
from limbeck.students.compressed.experts import check_layer, compressed_experts, set_experts
from limbeck.students.mixing import OwnInit, derived_config, derived_model, retype_body


class Compressed(OwnInit):
    """Mixed into a causal LM's class: experts are exchanged once the model is made."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the architecture's own
        exchange_experts(self)


@cache
def compressed_config(base: str) -> Any:
    """The config class of `compressed_BASE`."""
    fields = {"expert_layers": (list | None, None)}
    doc = "whose experts are held as `expert_layers` says, layer by layer."
    return derived_config(COMPRESSED_PREFIX + base, base, "Compressed", fields, _validate_layers, doc)


def _validate_layers(config: Any) -> None:
    layers = config.expert_layers
    if layers is None:
        return
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"expert_layers has {len(layers)} entries and num_hidden_layers is {config.num_hidden_layers}")
    for layer in layers:
        try:
            if layer is not None:
                check_layer(layer)
        except ConfigError as error:
            raise ValueError(str(error)) from None


@cache
def compressed_model(base: str) -> Any:
    """The causal LM class of `compressed_BASE`."""
    return derived_model(compressed_config(base), base, "Compressed", Compressed)


def routed_block(layer: Any) -> Any | None:
    """The part of a decoder layer that has routed experts and their router; None where it has none."""
    block = getattr(layer, "mlp", None)
    held = getattr(block, "experts", None)
    return block if isinstance(held, nn.Module) and hasattr(block, "gate") else None


def exchange_experts(model: Any) -> None:
    """Put experts of the config's description in the place of those that the architecture makes."""
    retype_body(model)
    for layer, described in zip(model.model.layers, model.config.expert_layers or [], strict=False):
        block = routed_block(layer)
        if described is None or block is None:
            continue
        place = block.gate.weight
        made = compressed_experts(block.experts, model.config, described)
        block.experts = made.to(device=place.device, dtype=place.dtype)
        if described["method"] == "prune":
            narrow = copy.copy(model.config)
            set_experts(narrow, described["experts"])
            block.gate = type(block.gate)(narrow).to(device=place.device, dtype=place.dtype)
    if model.config.expert_layers is not None:
        model.init_weights()  # those that are new; from_pretrained has its own turn afterwards
