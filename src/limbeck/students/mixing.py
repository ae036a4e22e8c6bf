"""What our decoders over transformers' own classes share: classes of two parents, and first values of our modules.

The one idea: an architecture of ours is one of transformers with some modules exchanged, so its classes are a mixin of
ours over theirs, under their name, by which accelerate and FSDP know them.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

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
