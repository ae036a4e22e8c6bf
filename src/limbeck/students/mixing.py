"""What our decoders over transformers' own classes share: classes of two parents, and first values of our modules.

The one idea: an architecture of ours is one of transformers with some modules exchanged, so its classes are a mixin of
ours over theirs, under their name, by which accelerate and FSDP know them.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from limbeck.registration import AUTO

Tensor = torch.Tensor


class OwnModule(nn.Module):
    """A module of ours inside a model of transformers, which says how its parameters and buffers begin."""

    def initial(self) -> dict[str, Tensor]:
        """First values by the name of the parameter or buffer."""
        raise NotImplementedError


class OwnInit:
    """Mixed into the classes of a model and of its body, which transformers asks to initialise what they hold."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, OwnModule):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)  # type: ignore[misc]


@cache
def mixed_class(mixin: type, parent: type) -> Any:
    """A class that is both, under the parent's name."""
    return type(parent.__name__, (mixin, parent), {"__module__": __name__})


def retype_body(model: Any) -> None:
    """Let a causal LM's body initialise our modules too."""
    body = model.model
    body.__class__ = mixed_class(OwnInit, body.__class__)
    # transformers has noted under the class of before what it may record.
    _CAN_RECORD_REGISTRY[body] = body._can_record_outputs


def derived_config(
    model_type: str,
    base: str,
    title: str,
    fields: Mapping[str, tuple[Any, Any]],
    validate: Callable[[Any], None],
    doc: str,
) -> Any:
    """The config class of an architecture of ours over one of transformers.

    Args:
        model_type: ours.
        base: theirs.
        title: put before the name of their class.
        fields: what ours has beside theirs: name -> (type, default).
        validate: refuses values that stand for no model, by ValueError.
        doc: what follows the name of their class.
    """
    parent: Any = CONFIG_MAPPING[base]
    made: Any = type(
        f"{title}{parent.__name__}",
        (parent,),
        {
            "model_type": model_type,
            **{name: default for name, (_, default) in fields.items()},
            "__module__": AUTO,
            "__annotations__": {name: kind for name, (kind, _) in fields.items()},
            "__doc__": f"{parent.__name__} {doc}",
            "validate_own": validate,
        },
    )
    return strict(made)


def derived_model(config: Any, base: str, title: str, mixin: type) -> Any:
    """The causal LM class of a derived config, known to `AutoModelForCausalLM`."""
    parent: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]
    made = type(f"{title}{parent.__name__}", (mixin, parent), {"config_class": config, "__module__": AUTO})
    AutoModelForCausalLM.register(config, made, exist_ok=True)
    return made
