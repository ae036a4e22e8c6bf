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


#: Keys that hold a named part: another name takes none of the former part's parameters with it.
PARTS = ("divergence",)


def merged(base: Any, over: Any, key: str = "") -> Any:
    """Nested mappings laid over one another; parameters are laid over a part that was given by its name alone."""
    if key in PARTS and isinstance(over, Mapping):
        base = {"name": base} if isinstance(base, str) else base
        if "name" in over and isinstance(base, Mapping) and over["name"] != base.get("name"):
            return over
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {name: merged(base.get(name), over[name], name) if name in over else base[name]
                for name in {**base, **over}}  # fmt: skip
    return over
