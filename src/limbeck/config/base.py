"""What every section of a recipe is made of."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe; refuses keys it does not define."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def merged(base: Any, over: Any) -> Any:
    """Nested mappings laid over one another; parameters are laid over a part that was given by its name alone."""
    if isinstance(over, Mapping) and isinstance(base, str) and "name" not in over:
        base = {"name": base}
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {key: merged(base.get(key), over[key]) if key in over else base[key] for key in {**base, **over}}
    return over
