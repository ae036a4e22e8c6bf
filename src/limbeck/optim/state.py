"""Where an optimizer keeps what it remembers of a parameter: beside it, or where the parameter says.

The one idea: a parameter that lives elsewhere (see `training/offload.py`) brings a function that makes its state there.
"""

from collections.abc import Callable

import torch

Tensor = torch.Tensor
#: Attribute of a parameter: makes a tensor of zeros like it, by the name of the state.
STATE_HOME = "limbeck_state_home"


def state_like(parameter: Tensor, key: str) -> Tensor:
    """Zeros like the parameter, for what the optimizer calls `key`."""
    home: Callable[[str, Tensor], Tensor] | None = getattr(parameter, STATE_HOME, None)
    return torch.zeros_like(parameter) if home is None else home(key, parameter)


def lives_elsewhere(parameter: Tensor) -> bool:
    """True for parameters that are stepped one at a time, so that a step holds one tensor's copies."""
    return hasattr(parameter, STATE_HOME)
